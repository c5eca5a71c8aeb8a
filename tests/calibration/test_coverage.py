"""Experts without tokens are reported, topped up, and fail the run."""

from __future__ import annotations

import numpy as np
import pytest

from deeptalk_edge.calibration.coverage import (
    Coverage,
    ExpertCoverage,
    chosen_tokens,
    own_modality,
    routed_counts,
    router_scores,
)
from deeptalk_edge.calibration.observe import PHASES, LayerTokens
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.experts.routes import Modality

NUM_EXPERTS, SEEN, TOKENS = 16, 5, 600
AUDIO = [[0, 1, 2, 8, 9, 10, 11]]


@pytest.fixture(scope="module")
def skewed() -> tuple[LayerTokens, np.ndarray]:
    """Tokens of a router whose first five experts win every choice, and its scores."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, 32)).astype(np.float32)
    x[:, 0] = 1.0
    gate = rng.standard_normal((NUM_EXPERTS, 32)).astype(np.float32)
    gate[SEEN:, 0] -= 60.0
    scores = router_scores(x, gate)
    ids = np.argsort(-scores, axis=1)[:, :2]
    modality = rng.integers(0, 3, TOKENS).astype(np.uint8)
    return LayerTokens(x, ids, np.take_along_axis(scores, ids, axis=1), modality), scores


def coverage_of(tokens: LayerTokens, floor: int) -> Coverage:
    counts = np.zeros((NUM_EXPERTS, len(Modality), len(PHASES)), np.int64)
    for kind in Modality:
        np.add.at(counts[:, kind, 0], tokens.ids[tokens.modality == kind].ravel(), 1)
    experts = []
    for expert in range(NUM_EXPERTS):
        own = own_modality(AUDIO, 0, expert)
        experts.append(
            ExpertCoverage(
                layer=1,
                expert=expert,
                own=own,
                routed=int(routed_counts(counts[expert], own)),
                routed_all=int(counts[expert].sum()),
                forced=0,
            )
        )
    return Coverage(experts=tuple(experts), floor=floor, threshold=256)


def test_the_eleven_unseen_experts_are_named_and_fail_the_run(
    skewed: tuple[LayerTokens, np.ndarray],
) -> None:
    coverage = coverage_of(skewed[0], floor=1)
    assert [e.expert for e in coverage.below_floor] == list(range(SEEN, NUM_EXPERTS))
    with pytest.raises(SettingsError) as error:
        coverage.check()
    said = str(error.value)
    assert said.startswith("11 of 16 experts")
    for expert in range(SEEN, NUM_EXPERTS):
        assert f"layer 1 expert {expert} " in said
    assert "spoken questions" in said
    assert "typed questions" in said
    coverage_of(skewed[0], floor=0).check()


def test_an_unseen_expert_gets_the_best_tokens_of_its_own_modality_and_they_are_forced(
    skewed: tuple[LayerTokens, np.ndarray],
) -> None:
    tokens, scores = skewed
    for expert in range(SEEN, NUM_EXPERTS):
        own = own_modality(AUDIO, 0, expert)
        rows, weights, forced = chosen_tokens(tokens, scores, expert, own, threshold=64)
        assert forced == len(rows) == 64
        kinds = set(tokens.modality[rows].tolist())
        assert kinds <= ({1, 2} if own == "audio" else {0})
        left = np.setdiff1d(np.flatnonzero(np.isin(tokens.modality, list(kinds))), rows)
        assert scores[rows, expert].min() >= scores[left, expert].max()
        assert (weights == scores[rows, expert]).all()


def test_an_expert_with_enough_tokens_gets_no_more(
    skewed: tuple[LayerTokens, np.ndarray],
) -> None:
    tokens, scores = skewed
    rows, _, forced = chosen_tokens(tokens, scores, 0, "audio", threshold=16)
    assert forced == 0
    assert (tokens.ids[rows] == 0).any(axis=1).all()


def test_a_checkpoint_without_a_split_has_one_modality() -> None:
    assert own_modality([[], []], 1, 3) == "any"
    counts = np.arange(6).reshape(3, 2)
    assert routed_counts(counts, "any") == counts.sum()
    assert routed_counts(counts, "text") + routed_counts(counts, "audio") == counts.sum()
