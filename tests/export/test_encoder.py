"""encoder.onnx against the torch reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deeptalk_edge.checkpoint import Checkpoint
from deeptalk_edge.export.encoder import export_encoder
from deeptalk_edge.export.golden import GraphRunner
from deeptalk_edge.spec import ModelSpec
from tests.export.checkpoints import check_graphs, write_checkpoint
from tests.specs import PLAIN

TOLERANCE = 1e-4  # float32 on features of some units

WIDE = replace(PLAIN, encoder=replace(PLAIN.encoder, width=40, num_heads=4, num_layers=3))


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
