"""encoder.onnx against the torch reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.export.graphs.encoder import Products, export_encoder
from deeptalk_edge.export.verify.golden import GraphRunner
from deeptalk_edge.export.verify.reference import Reference
from deeptalk_edge.model.features import log_mel, num_frames
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.sound.wav import read_wav
from tests.export.checkpoints import check_graphs, write_checkpoint
from tests.places import TINY
from tests.specs import PLAIN

TOLERANCE = 1e-4  # float32 on features of some units

WIDE = replace(PLAIN, encoder=replace(PLAIN.encoder, width=40, num_heads=4, num_layers=3))


def test_int8_features_equal_the_models_within_rounding(tmp_path: Path) -> None:
    """The tiny checkpoint's encoder on a spoken question: an error of 0.03 of the largest feature
    was measured."""
    tiny = TINY
    checkpoint = Checkpoint.open(tiny)
    pcm = read_wav(sorted((tiny / "questions").glob("*.wav"))[0]).pcm
    heard = {
        "log_mel": log_mel(pcm, checkpoint.spec.encoder)[None],
        "num_frames": np.array(num_frames(len(pcm))),
    }
    features = []
    kinds: tuple[Products, ...] = ("float", "int8")
    for products in kinds:
        place = tmp_path / products
        place.mkdir()
        export_encoder(checkpoint, place, products=products)
        features.append(GraphRunner(place / "encoder.onnx")(heard)["features"])
    exact, rounded = features
    assert 1e-3 < np.abs(rounded - exact).max() / np.abs(exact).max() < 0.06
    sizes = [(tmp_path / products / "encoder.bin").stat().st_size for products in kinds]
    assert sizes[1] < sizes[0] / 2


def test_int8_products_in_float16_are_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint").place)
    with pytest.raises(ValueError, match="not float16"):
        export_encoder(checkpoint, tmp_path, precision="float16", products="int8")


@pytest.mark.parametrize("spec", [PLAIN, WIDE], ids=["plain", "wide"])
@pytest.mark.parametrize("kept", [1, 7, 16])
def test_the_features_equal_the_models_first_ones(
    spec: ModelSpec, kept: int, tmp_path: Path
) -> None:
    written = write_checkpoint(tmp_path / "checkpoint", spec)
    export_encoder(Checkpoint.open(written.place), tmp_path)
    assert check_graphs(tmp_path) == 1
    log_mel = random_mel(spec)
    with torch.inference_mode():
        expected = written.model.encode(torch.from_numpy(log_mel))[0].numpy()
    feeds = {"log_mel": log_mel, "num_frames": np.array(kept)}
    found = GraphRunner(tmp_path / "encoder.onnx")(feeds)["features"]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected[:kept], atol=TOLERANCE, rtol=0)


def test_a_shorter_window_equals_the_reference_on_a_shorter_input(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint", WIDE).place)
    export_encoder(checkpoint, tmp_path)
    near = random_mel(WIDE)[..., :20]
    feeds = {"log_mel": near, "num_frames": np.array(6)}
    found = GraphRunner(tmp_path / "encoder.onnx")(feeds)["features"]
    expected = Reference(checkpoint).encode(near[0])[:6]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    whole = Reference(checkpoint).encode(random_mel(WIDE)[0])[:6]
    assert np.abs(whole - expected).max() > 10 * TOLERANCE


def test_an_engines_encoder_takes_and_gives_its_whole_window(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "checkpoint")
    export_encoder(Checkpoint.open(written.place), tmp_path, is_fixed=True)
    graph = GraphRunner(tmp_path / "encoder.onnx")
    assert graph.input_names == ["log_mel"]
    features = graph({"log_mel": random_mel(PLAIN)})["features"]
    with torch.inference_mode():
        expected = written.model.encode(torch.from_numpy(random_mel(PLAIN)))[0].numpy()
    np.testing.assert_allclose(features, expected, atol=TOLERANCE, rtol=0)


def random_mel(spec: ModelSpec) -> NDArray[np.float32]:
    shape = (1, spec.encoder.num_mel_bins, 2 * spec.encoder.max_frames)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)
