"""Measured use counts are used only if they save reads on held-out turns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from deeptalk_edge.calibration.paging import measured_use_counts, paging_gain
from deeptalk_edge.runtime.experts.policy import Phase, Phased, UseCounts
from deeptalk_edge.runtime.experts.routes import Call, Pass, Routes

LAYERS, EXPERTS = (1, 2), 16


def routes(*, turns: int, cyclic: bool) -> Routes:
    """Routes of two experts per layer and step: in a fixed cycle, or at random."""
    rng, passes = np.random.default_rng(0), []
    for turn in range(turns):
        for step in range(60):
            each = Pass(Phase.SPEAKING, turn, 1)
            for layer in LAYERS:
                first = (2 * step) % EXPERTS
                chosen = [first, first + 1] if cyclic else rng.permutation(EXPERTS)[:2]
                ids = np.array([chosen], np.int64)
                none = np.empty((0, 2), np.int64)
                weights = np.ones((1, 2), np.float32)
                each.calls.append(Call(layer, ids, weights, np.full(1, 2, np.uint8), none))
            passes.append(each)
    return Routes(
        layers=LAYERS,
        num_experts=EXPERTS,
        top_k=2,
        record_bytes=4096,
        passes=passes,
        source="synthetic for a test",
    )


def test_counts_are_used_only_where_every_pool_gains_two_points() -> None:
    gain = paging_gain(routes(turns=6, cyclic=True))
    assert gain is not None
    assert len(gain.pools) == len(gain.phased) == len(gain.measured) == 3
    gains = [a - b for a, b in zip(gain.measured, gain.phased, strict=True)]
    assert gain.used is (min(gains) >= 0.02)


def test_random_routes_gain_nothing_and_leave_the_pager_as_it_is() -> None:
    gain = paging_gain(routes(turns=6, cyclic=False))
    assert gain is not None
    assert not gain.used


def test_too_few_turns_hold_nothing_out() -> None:
    assert paging_gain(routes(turns=3, cyclic=True)) is None


def test_an_expert_that_follows_scores_higher_than_one_that_does_not() -> None:
    succession = np.zeros((1, 4, 4), np.float32)
    succession[0, 1, 2] = 1.0
    nothing = np.zeros((1, 4))
    policy = Phased(4, 4, UseCounts(nothing, nothing, succession))
    policy.begin(Phase.SPEAKING)
    policy.use([1])
    score = policy.score(np.arange(4))
    assert score[2] > score[3]
    plain = replace(measured_use_counts(routes(turns=4, cyclic=True)), succession=None)
    assert plain.succession is None
