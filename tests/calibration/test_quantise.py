"""The weight quantiser rounds to nearest and refuses weights that it cannot represent."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deeptalk_edge.bundle.expert_record import INT4_GROUPS, ExpertDtype, RecordFormat
from deeptalk_edge.calibration.quantise import quantise_expert, quantise_int4, quantise_int8

Matrix = npt.NDArray[np.float32]


def matrices(columns: int, largest: float) -> st.SearchStrategy[Matrix]:
    return hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.just(columns)),
        elements=st.floats(-largest, largest, width=32),
    )


@given(matrices(48, 2.0**120))
@settings(deadline=None, max_examples=60)
def test_int8_errs_by_at_most_half_a_step(weights: Matrix) -> None:
    integers, scales = quantise_int8(weights)
    error = np.abs(integers * scales.astype(np.float64) - weights)
    assert (error <= scales.astype(np.float64) * 0.50001 + 1e-44).all()
    assert np.abs(integers.astype(int)).max() <= 127


@given(matrices(128, 2.0**18), st.sampled_from(INT4_GROUPS))
@settings(deadline=None, max_examples=60)
def test_int4_errs_by_at_most_half_a_step(weights: Matrix, group: int) -> None:
    integers, scales = quantise_int4(weights, group)
    steps = np.repeat(scales.astype(np.float64), group, axis=1)
    error = np.abs(integers * steps - weights)
    # A scale rounded down to float16 leaves the largest weight up to 7 half-roundings outside.
    rounding = 7 * np.maximum(steps * 2.0**-11, 2.0**-25)
    assert (error <= steps * 0.5 + rounding).all()
    assert np.abs(integers.astype(int)).max() <= 7


@given(matrices(64, 1.0))
@settings(deadline=None, max_examples=20)
def test_the_same_weights_give_the_same_bytes(weights: Matrix) -> None:
    first, second = quantise_int4(weights, 64), quantise_int4(weights.copy(order="F"), 64)
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()


def test_rows_of_zeros_stay_zeros_and_spoil_no_neighbour() -> None:
    weights = np.zeros((2, 64), np.float32)
    weights[1, 7] = 3.0
    with np.errstate(all="raise"):  # 0 / 0 would become an arbitrary int8
        results = (quantise_int8(weights), quantise_int4(weights, 64))
    for integers, scales in results:
        assert not integers[0].any()
        assert scales[0, 0] == 1
        assert integers[1, 7] * float(scales[1, 0]) == pytest.approx(3.0, rel=1e-3)


def test_huge_rows_overflow_nothing_in_int8() -> None:
    weights = np.full((1, 16), np.finfo(np.float32).max, np.float32)
    integers, scales = quantise_int8(weights)
    assert (integers == 127).all()
    assert np.isfinite(scales).all()


def test_int4_refuses_a_weight_whose_scale_float16_cannot_hold() -> None:
    weights = np.zeros((1, 64), np.float32)
    weights[0, 0] = 65504 * 7
    quantise_int4(weights, 64)
    weights[0, 0] *= 1.01
    with pytest.raises(ValueError, match="use int8"):
        quantise_int4(weights, 64)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("dtype", "group"),
    [("float32", None), ("float16", None), ("bfloat16", None), ("int8", None), ("int4", 64)],
)
def test_a_weight_that_is_not_finite_is_refused(
    bad: float, dtype: ExpertDtype, group: int | None
) -> None:
    record_format = RecordFormat(dtype=dtype, group=group, width=64, ffn_width=64)
    gate_up, down = np.zeros((128, 64), np.float32), np.zeros((64, 64), np.float32)
    down[3, 4] = bad
    with pytest.raises(ValueError, match="damaged"):
        quantise_expert(record_format, gate_up, down)


def test_float16_records_refuse_a_weight_beyond_float16() -> None:
    record_format = RecordFormat(dtype="float16", width=16, ffn_width=16)
    gate_up, down = np.full((32, 16), 1e5, np.float32), np.zeros((16, 16), np.float32)
    with pytest.raises(ValueError, match="does not fit float16"):
        quantise_expert(record_format, gate_up, down)


@pytest.mark.parametrize(
    ("dtype", "group", "tolerance"),
    [
        ("float32", None, 0.0),
        ("float16", None, 2.0**-11),
        ("bfloat16", None, 2.0**-8),
        ("int8", None, 0.5 / 127),
        ("int4", 64, 0.5 / 7 + 0.001),
        ("int4", 128, 0.5 / 7 + 0.001),
    ],
)
def test_an_expert_survives_quantising_packing_and_back(
    dtype: ExpertDtype, group: int | None, tolerance: float
) -> None:
    record_format = RecordFormat(dtype=dtype, group=group, width=256, ffn_width=128)
    rng = np.random.default_rng(0)
    gate_up = rng.standard_normal((256, 256)).astype(np.float32)
    down = rng.standard_normal((256, 128)).astype(np.float32)
    weights = quantise_expert(record_format, gate_up, down)
    back = record_format.dequantise(record_format.unpack(record_format.pack(weights)))
    for found, expected in zip(back, (gate_up, down), strict=True):
        largest = np.abs(expected).max(axis=1, keepdims=True)
        assert (np.abs(found - expected) <= tolerance * largest).all()


def test_a_matrix_of_another_shape_is_refused() -> None:
    record_format = RecordFormat(dtype="int8", width=64, ffn_width=32)
    with pytest.raises(ValueError, match="down of an expert"):
        quantise_expert(record_format, np.zeros((64, 64)), np.zeros((32, 64)))
