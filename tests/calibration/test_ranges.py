"""Methods that choose scales are never worse than rounding by their own measure, and always
valid."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deeptalk_edge.bundle.expert_record import ExpertWeights, RecordFormat, pack_int4, unpack_int4
from deeptalk_edge.calibration.quantise import dequantised, quantise_int4, quantise_int8
from deeptalk_edge.calibration.ranges.channels import activation_aware, normalised, smoothing
from deeptalk_edge.calibration.ranges.clipping import clipped, grams_of_groups
from deeptalk_edge.calibration.ranges.gptq import error_feedback

Matrix = npt.NDArray[np.float32]

ADVERSARIAL = hnp.arrays(
    np.float32,
    (3, 64),
    elements=st.one_of(
        st.just(0.0),
        st.sampled_from([1e-38, -1e-30, 1e-8, 6e-5, 1.0, -3e4, 4e5]),
        st.floats(-(2.0**18), 2.0**18, width=32),
    ),
)


def inputs(num_tokens: int = 400, columns: int = 64, seed: int = 0) -> Matrix:
    """Correlated inputs with very different channel scales, like activations."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(columns) + 0.3 * rng.standard_normal((columns, columns))
    x = rng.standard_normal((num_tokens, columns)) @ mixing * np.exp(rng.standard_normal(columns))
    return np.asarray(x, np.float32)


def weights(rows: int = 48, columns: int = 64, seed: int = 1) -> Matrix:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def output_error(x: Matrix, w: Matrix, held: tuple[Any, Any]) -> float:
    return float(np.linalg.norm(x @ dequantised(*held).T - x @ w.T) / np.linalg.norm(x @ w.T))


@given(ADVERSARIAL)
@settings(deadline=None, max_examples=40)
def test_no_method_gives_a_scale_that_is_zero_infinite_or_nan(w: Matrix) -> None:
    x = inputs(columns=64)[:20]
    held: list[tuple[Any, Any]] = [
        quantise_int8(w),
        quantise_int4(w, 32),
        clipped(w, 127, 64),
        clipped(w, 7, 32),
        clipped(w, 7, 32, grams_of_groups(x, 32)),
        error_feedback(w, 7, 32, x.T @ x),
        error_feedback(w, 127, 64, x.T @ x),
    ]
    for integers, scales in held:
        assert np.isfinite(scales.astype(np.float64)).all()
        assert (scales > 0).all()
        assert np.isfinite(dequantised(integers, scales)).all()


@given(ADVERSARIAL)
@settings(deadline=None, max_examples=40)
def test_clipping_is_never_worse_than_rounding_in_squared_error(w: Matrix) -> None:
    rounded, best = (
        np.square(dequantised(*held).astype(np.float64) - w).sum()
        for held in (quantise_int4(w, 32), clipped(w, 7, 32))
    )
    assert best <= rounded * (1 + 1e-5) + 1e-30


@pytest.mark.parametrize(("limit", "group"), [(7, 32), (7, 64), (127, 64)])
def test_each_measure_of_the_inputs_beats_rounding_on_the_product(limit: int, group: int) -> None:
    x, w = inputs(), weights()
    rounded = quantise_int4(w, group) if limit == 7 else quantise_int8(w)
    error = output_error(x, w, rounded)
    aware = output_error(x, w, clipped(w, limit, group, grams_of_groups(x, group)))
    fed_back = output_error(x, w, error_feedback(w, limit, group, x.T @ x))
    assert aware <= error * 1.001
    assert fed_back < 0.85 * error


def test_gptq_on_inputs_without_correlation_or_rank_is_still_sound() -> None:
    w, few = weights(), inputs(3)
    for gram in (np.zeros((64, 64), np.float32), few.T @ few):
        integers, scales = error_feedback(w, 7, 32, gram)
        assert np.isfinite(dequantised(integers, scales)).all()
    assert output_error(few, w, (integers, scales)) < output_error(few, w, quantise_int4(w, 32))
    with pytest.raises(ValueError, match="NaN"):
        error_feedback(w, 7, 32, np.full((64, 64), np.nan, np.float32))


def test_every_method_gives_the_same_bytes_twice() -> None:
    x, w = inputs(), weights()
    for first, second in (
        [clipped(w, 7, 32, grams_of_groups(x, 32)) for _ in range(2)],
        [error_feedback(w, 7, 32, x.T @ x) for _ in range(2)],
    ):
        assert first[0].tobytes() == second[0].tobytes()
        assert first[1].tobytes() == second[1].tobytes()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_rows_that_are_not_whole_groups_are_refused_by_all(group: int) -> None:
    w = weights(columns=group + 16)
    for refuse in (lambda: quantise_int4(w, group), lambda: clipped(w, 7, group)):
        with pytest.raises(ValueError, match="not whole groups"):
            refuse()


@given(hnp.arrays(np.int8, (5, 64), elements=st.integers(-8, 7)))
@settings(deadline=None, max_examples=30)
def test_packing_is_exact_both_ways(integers: npt.NDArray[np.int8]) -> None:
    assert (unpack_int4(pack_int4(integers)) == integers).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_calibrated_expert_is_a_record_that_kernels_read(group: int) -> None:
    form = RecordFormat(dtype="int4", group=group, width=128, ffn_width=256)
    x = inputs(columns=128)
    gate_up, down = weights(512, 128), weights(128, 256)
    hidden = inputs(columns=256)
    held = ExpertWeights(
        *(
            part
            for pair in zip(
                error_feedback(gate_up, 7, group, x.T @ x),
                error_feedback(down, 7, group, hidden.T @ hidden),
                strict=True,
            )
            for part in pair
        )
    )
    back = form.unpack(form.pack(held))
    for name in ("gate_up", "down", "gate_up_scales", "down_scales"):
        assert (getattr(back, name) == getattr(held, name)).all()


def test_channel_scales_are_positive_finite_and_around_one() -> None:
    silent = np.array([0.0, np.inf, np.nan, 1e-30, 5.0])
    for scales in (normalised(silent), smoothing(np.abs(silent[:1]), np.zeros(1), 0.5)):
        assert np.isfinite(scales).all()
        assert (scales > 0).all()
    assert (normalised(np.zeros(3)) == 1).all()


def test_the_least_error_chooses_the_exponent() -> None:
    loud = np.array([1.0, 16.0])
    found = activation_aware(loud, lambda scales: abs(float(scales[1] / scales[0]) - 4.0))
    assert found[1] / found[0] == pytest.approx(4.0)
