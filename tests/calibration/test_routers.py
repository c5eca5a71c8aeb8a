"""Routers fitted to the inputs that quantised experts leave them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.calibration.routers import FittedRouter, RouterFit

Array = NDArray[np.float32]
TOP_K = 2


def chosen(weight: Array, x: Array) -> NDArray[np.int64]:
    return np.argsort(-(x @ weight.T), axis=1)[:, :TOP_K]


def shifted(x: Array, rng: np.random.Generator, shift: float) -> Array:
    """What a quantised layer makes of inputs: a fixed linear error and noise."""
    mix = np.eye(x.shape[1]) + shift * rng.standard_normal((x.shape[1], x.shape[1]))
    return np.asarray(x @ mix + 0.01 * rng.standard_normal(x.shape), np.float32)


def fit(shift: float, *, num_rows: int = 600) -> tuple[FittedRouter, Array, Array, Array]:
    """A router of 8 experts, 16 wide; returns it with new inputs as both models see them."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 16)).astype(np.float32)
    x = rng.standard_normal((num_rows + 800, 16)).astype(np.float32)
    seen = shifted(x, rng, shift)
    router = RouterFit(weight)
    router.add(seen[:num_rows], x[:num_rows])
    held, new = slice(num_rows, num_rows + 400), slice(num_rows + 400, None)
    router.hold(seen[held], chosen(weight, x[held]))
    return router.fitted(), weight, x[new], seen[new]


def agreement(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    return float((found[:, :, None] == wanted[:, None, :]).sum() / wanted.size)


def test_a_fitted_router_chooses_as_the_float_one_on_new_rows() -> None:
    fitted, weight, x, seen = fit(0.1)
    assert fitted.weight is not None
    wanted = chosen(weight, x)
    trained = agreement(chosen(weight, seen), wanted)
    assert trained < 0.85
    assert agreement(chosen(fitted.weight, seen), wanted) > 0.98
    assert fitted.agreement < fitted.fitted_agreement
    assert fitted.rows == 600


def test_a_router_that_sees_what_it_was_trained_on_is_kept() -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((8, 16)).astype(np.float32)
    x = rng.standard_normal((200, 16)).astype(np.float32)
    router = RouterFit(weight)
    router.add(x[:100], x[:100])
    router.hold(x[100:], chosen(weight, x[100:]))
    found = router.fitted()
    assert found.weight is None
    assert found.agreement == found.fitted_agreement == 1.0


def test_a_fit_that_does_worse_on_rows_held_back_is_dropped() -> None:
    """Rows that say nothing about the held ones."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((8, 16)).astype(np.float32)
    x = rng.standard_normal((300, 16)).astype(np.float32)
    router = RouterFit(weight)
    router.add(x[:10], rng.standard_normal((10, 16)).astype(np.float32) * 10)
    router.hold(x, chosen(weight, x))
    assert router.fitted().weight is None


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_inputs_of_nothing_keep_the_router(value: float) -> None:
    weight = np.ones((4, 8), np.float32)
    router = RouterFit(weight)
    nothing = np.full((5, 8), value, np.float32)
    router.add(nothing, nothing)
    router.hold(nothing, np.zeros((5, 2), np.int64))
    found = router.fitted()
    assert found.weight is None or np.isfinite(found.weight).all()
