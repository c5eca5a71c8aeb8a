"""The numpy reference, which the exporter compares with, against torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.export.packed.experts import RoundedExperts
from deeptalk_edge.export.verify.codec_reference import decode_codes
from deeptalk_edge.export.verify.reference import Reference
from deeptalk_edge.model.spec import CodecSpec, ModelSpec
from tests.export.checkpoints import (
    CODEC,
    ODD_CODEC,
    CodecTensors,
    random_codec,
    write_checkpoint,
)
from tests.export.graphs.test_step import SPECS_OF_ENGINES
from tests.training.random_models import random_rows

TOLERANCE = 1e-4  # float32 on values of some tens
NUM_ROWS = 9


@pytest.mark.parametrize("spec", SPECS_OF_ENGINES.values(), ids=SPECS_OF_ENGINES.keys())
def test_the_reference_equals_the_model(spec: ModelSpec, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "checkpoint", spec).model
    records = RecordFormat(dtype="float32", width=64, ffn_width=64)
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    reference = Reference(checkpoint, RoundedExperts(checkpoint, records))
    generator = torch.Generator().manual_seed(0)
    encoder = spec.encoder
    log_mel = torch.randn(encoder.num_mel_bins, 2 * encoder.max_frames, generator=generator)
    rows = random_rows(spec, 1, NUM_ROWS)
    mask = torch.arange(NUM_ROWS) % 3 == 1
    with torch.inference_mode():
        features = model.encode(log_mel[None])[0, :NUM_ROWS]
        hidden = model(rows, features[None], mask[None])[0]
        text, codes = model.text_logits(hidden), model.code_logits(hidden)
    found = reference.encode(log_mel.numpy())[:NUM_ROWS]
    _assert_close(found, features)
    x = reference.embed(rows[0].numpy(), found, mask.numpy())
    _assert_close(reference.decode(x), hidden)
    for logits, expected in zip(reference.logits(hidden.numpy()), (text, codes), strict=True):
        _assert_close(logits, expected)


@pytest.mark.parametrize("spec", [CODEC, ODD_CODEC], ids=["24 kHz", "odd rates, dense"])
def test_the_reference_equals_the_codec(spec: CodecSpec) -> None:
    codec = random_codec(spec)
    codes = np.random.default_rng(0).integers(0, spec.codebook_size, (5, spec.frame_codes))
    with torch.inference_mode():
        expected = codec.decode(torch.from_numpy(codes)[None])[0]
    _assert_close(decode_codes(CodecTensors(codec), codes), expected, tolerance=1e-5)


def _assert_close(
    found: NDArray[np.float32], expected: torch.Tensor, tolerance: float = TOLERANCE
) -> None:
    assert expected.abs().max() > 0.1
    np.testing.assert_allclose(found, expected.numpy(), atol=tolerance, rtol=0)
