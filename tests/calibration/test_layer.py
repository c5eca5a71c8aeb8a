"""One expert, quantised by every method."""

from __future__ import annotations

import numpy as np
import pytest

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.calibration.layer import Method, quantised_expert


@pytest.mark.parametrize("method", ["rtn", "mse", "gptq", "awq"])
@pytest.mark.parametrize(("group", "limit"), [(32, 7), (None, 127)])
def test_an_expert_fills_the_range_of_its_integers(
    method: Method, group: int | None, limit: int
) -> None:
    rng = np.random.default_rng(0)
    form = RecordFormat(dtype="int4" if group else "int8", group=group, width=32, ffn_width=64)
    gate_up, down = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((128, 32), (32, 64))
    )
    x, weights = rng.standard_normal((50, 32)).astype(np.float32), np.ones(50, np.float32)
    found = quantised_expert(method, form, gate_up, down, x, weights)
    for integers in (found.gate_up, found.down):
        assert np.abs(integers.astype(int)).max() == limit
    for held, wanted in zip(form.dequantise(found), (gate_up, down), strict=True):
        assert np.linalg.norm(held - wanted) < (0.2 if group else 0.02) * np.linalg.norm(wanted)
