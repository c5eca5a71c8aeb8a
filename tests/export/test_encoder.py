"""encoder.onnx against the torch reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deeptalk_edge.checkpoint import Checkpoint
from deeptalk_edge.export.encoder import Products, export_encoder
from deeptalk_edge.export.golden import GraphRunner
from deeptalk_edge.features import log_mel, num_frames
from deeptalk_edge.runtime.audio.wav import read_wav
from deeptalk_edge.spec import ModelSpec
from tests.export.checkpoints import check_graphs, write_checkpoint
from tests.specs import PLAIN

TOLERANCE = 1e-4  # float32 on features of some units

WIDE = replace(PLAIN, encoder=replace(PLAIN.encoder, width=40, num_heads=4, num_layers=3))


def test_in_int8_the_features_are_the_models_within_its_steps(tmp_path: Path) -> None:
    """The tiny checkpoint's ear, on a spoken question: measured 0.03 of the greatest feature."""
    tiny = Path(__file__).parents[2] / "checkpoints/tiny"
    checkpoint = Checkpoint.open(tiny)
    pcm = read_wav(sorted((tiny / "questions").glob("*.wav"))[0]).pcm
    heard = {"log_mel": log_mel(pcm, checkpoint.spec.encoder)[None]}
    features = []
    kinds: tuple[Products, ...] = ("float", "int8")
    for products in kinds:
        place = tmp_path / products
        place.mkdir()
        export_encoder(checkpoint, place, products=products)
        found = GraphRunner(place / "encoder.onnx")(heard)["features"]
        features.append(found[: num_frames(len(pcm))])
    exact, rounded = features
    assert 1e-3 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.06
    sizes = [(tmp_path / products / "encoder.bin").stat().st_size for products in kinds]
    assert sizes[1] < sizes[0] / 2


def test_int8_products_in_float16_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint").place)
    with pytest.raises(ValueError, match="not float16"):
        export_encoder(checkpoint, tmp_path, precision="float16", products="int8")


@pytest.mark.parametrize("spec", [PLAIN, WIDE], ids=["plain", "wide"])
def test_the_features_are_the_models(spec: ModelSpec, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "checkpoint", spec)
    export_encoder(Checkpoint.open(written.place), tmp_path)
    assert check_graphs(tmp_path) == 1
    shape = (1, spec.encoder.num_mel_bins, 2 * spec.encoder.max_frames)
    log_mel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with torch.inference_mode():
        expected = written.model.encode(torch.from_numpy(log_mel))[0].numpy()
    found = GraphRunner(tmp_path / "encoder.onnx")({"log_mel": log_mel})["features"]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
