"""Accuracy is traded only if the settings allow it, and every trade is counted."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.runtime.experts.degrade import Degrade, DegradeSettings

NUM_EXPERTS, TOP_K, WIDTH, LAYER, SCALE = 8, 3, 6, 2, 1.5
random = np.random.default_rng(3)
NORMED = random.normal(size=(50, WIDTH)).astype(np.float32)
GATE = random.normal(size=(NUM_EXPERTS, WIDTH)).astype(np.float32)
LOGITS = NORMED @ GATE.T
RESIDENT = np.arange(NUM_EXPERTS) % 2 == 0

Ids = NDArray[np.int64]
Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


def routed() -> tuple[Ids, Array]:
    """The router's choice, in arbitrary order."""
    ids = np.sort(np.argsort(-LOGITS, axis=1)[:, :TOP_K], axis=1)
    gates = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    weights = SCALE * np.take_along_axis(gates, ids, axis=1)
    return ids, weights.astype(np.float32)


def degraded(resident: Mask, **settings: float) -> tuple[Degrade, Ids, Array, Mask]:
    ids, weights = routed()
    degrade = Degrade(DegradeSettings(**settings), {LAYER: GATE})  # type: ignore[arg-type]
    runs = degrade.apply(LAYER, ids, weights, NORMED, resident)
    return degrade, ids, weights, runs


def test_the_defaults_trade_nothing() -> None:
    degrade, ids, weights, runs = degraded(np.zeros(NUM_EXPERTS, np.bool_))
    np.testing.assert_array_equal(ids, routed()[0])
    np.testing.assert_array_equal(weights, routed()[1])
    assert runs.all()
    assert (degrade.num_substituted, degrade.num_skipped, degrade.kept_share) == (0, 0, 1.0)


def test_a_bonus_prefers_residents_and_never_replaces_the_best() -> None:
    degrade, ids, weights, runs = degraded(RESIDENT, bonus=0.5)
    wanted, _ = routed()
    best = np.argsort(-LOGITS, axis=1)[:, :2]
    for found, protected in zip(ids.tolist(), best.tolist(), strict=True):
        assert set(protected) <= set(found)
        assert len(set(found)) == TOP_K
    assert RESIDENT[ids].mean() > RESIDENT[wanted].mean()
    assert runs.all()
    replaced = int((ids != wanted).sum())
    assert degrade.num_substituted == replaced > 0
    assert degrade.num_uses == ids.size
    # A replacement has its own gate, on the model's scale.
    gates = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, SCALE * np.take_along_axis(gates, ids, 1), rtol=1e-4)
    assert degrade.kept_share == pytest.approx(weights.sum() / routed()[1].sum())
    assert degrade.kept_share is not None
    assert 0.8 < degrade.kept_share < 1


def test_only_absent_and_small_experts_are_skipped() -> None:
    degrade, ids, weights, runs = degraded(RESIDENT, skip_below=0.25)
    wanted, full = routed()
    share = full / full.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(ids, wanted)
    np.testing.assert_array_equal(~runs, ~RESIDENT[ids] & (share < 0.25))
    np.testing.assert_array_equal(weights, np.where(runs, full, 0))
    assert degrade.num_skipped == int((~runs).sum()) > 0
    assert degrade.kept_share == pytest.approx(full[runs].sum() / full.sum())


@pytest.mark.parametrize("wrong", [{"bonus": -0.1}, {"skip_below": 1.0}, {"protected": 0}])
def test_invalid_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DegradeSettings(**wrong)  # type: ignore[arg-type]


def test_gates_with_a_large_range_do_not_overflow() -> None:
    """e^89 is beyond float32."""
    logits = np.linspace(-400, 0, NUM_EXPERTS, dtype=np.float32)[None]
    gate, normed = logits.T, np.ones((1, 1), np.float32)
    degrade = Degrade(DegradeSettings(bonus=1.0, protected=1), {LAYER: gate})
    ids = np.array([[NUM_EXPERTS - 1, NUM_EXPERTS - 2]])
    weights = np.array([[0.9, 0.1]], np.float32)
    resident = np.arange(NUM_EXPERTS) == NUM_EXPERTS - 3
    degrade.apply(LAYER, ids, weights, normed, resident)
    assert ids.tolist() == [[NUM_EXPERTS - 1, NUM_EXPERTS - 3]]
    np.testing.assert_array_equal(weights, np.array([[0.9, 0.0]], np.float32))
