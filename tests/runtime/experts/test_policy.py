"""A policy chooses the experts to keep; it affects speed and never answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from deeptalk_edge.runtime.experts.policy import (
    POLICIES,
    Decayed,
    Lru,
    Phase,
    Phased,
    Pinned,
    Policy,
    UseCounts,
)

NUM_EXPERTS, NUM_LAYERS = 4, 3
NUM_KEYS = NUM_EXPERTS * NUM_LAYERS


def scores(policy: Policy) -> list[float]:
    found: list[float] = policy.score(np.arange(NUM_KEYS)).tolist()
    return found


def least(policy: Policy, keys: list[int]) -> int:
    return keys[int(policy.score(np.array(keys)).argmin())]


def test_lru_evicts_the_least_recently_used() -> None:
    policy = Lru(NUM_KEYS)
    policy.use([1, 2])
    policy.use([3])
    policy.use([1])
    assert least(policy, [1, 2, 3]) == 2


def passes(policy: Policy, *chosen: Sequence[int]) -> None:
    """Decode steps, each of which routes one layer."""
    for keys in chosen:
        policy.begin(Phase.SPEAKING)
        policy.use(keys)


def test_a_use_decays_and_of_equal_experts_the_older_is_evicted() -> None:
    policy = Decayed(NUM_KEYS, NUM_EXPERTS)
    passes(policy, *[[1]] * 3, *[[0]] * 60, [2])
    assert least(policy, [1, 2]) == 1
    passes(policy, [3])
    assert least(policy, [2, 3]) == 2


def test_recent_uses_soon_outweigh_older_frequent_uses() -> None:
    policy = Decayed(NUM_KEYS, NUM_EXPERTS)
    passes(policy, *[[1]] * 1000, [2], [2])
    assert least(policy, [1, 2]) == 1


def test_a_use_does_not_age_before_its_layer_comes() -> None:
    policy = Decayed(NUM_KEYS, NUM_EXPERTS)
    policy.begin(Phase.SPEAKING)
    policy.use([0])
    policy.use([4])
    passes(policy, [1])
    assert least(policy, [4, 0]) == 0
    assert scores(policy)[4] == scores(policy)[1]


def test_waves_of_one_layer_have_the_same_age() -> None:
    policy = Decayed(NUM_KEYS, NUM_EXPERTS)
    policy.begin(Phase.SPEAKING)
    policy.use([0])
    policy.use([1])
    assert scores(policy)[0] == scores(policy)[1]


def test_shares_survive_any_number_of_passes() -> None:
    policy = Decayed(NUM_KEYS, NUM_EXPERTS)
    passes(policy, *[[5, 6 + step % 2] for step in range(20_000)])
    assert scores(policy)[5] == pytest.approx(2)
    assert scores(policy)[6] == pytest.approx(1, abs=0.1)


def test_a_question_learns_its_experts_and_the_next_one_sweeps_them() -> None:
    policy = Phased(NUM_KEYS, NUM_EXPERTS)
    policy.begin(Phase.LISTENING)
    assert policy.sweep(NUM_KEYS) == []
    policy.begin(Phase.THINKING)
    policy.use([9, 8])
    policy.use([1])
    policy.begin(Phase.SPEAKING)
    policy.use([4])
    policy.begin(Phase.LISTENING)
    assert policy.sweep(NUM_KEYS) == [1, 8, 9]
    assert policy.sweep(1) == [1]


def test_a_question_weighs_a_fifth_of_those_before_it() -> None:
    policy, best = Phased(NUM_KEYS, NUM_EXPERTS), []
    for key in (1, 2, 2, 2, 2):  # shares of 1 and 2: 1 and 0, then 0.8 and 0.2, ... 0.41 and 0.59
        policy.begin(Phase.LISTENING)
        policy.begin(Phase.THINKING)
        policy.use([key])
        policy.begin(Phase.SPEAKING)
        best += policy.sweep(1)
    assert best == [1, 1, 1, 1, 2]
    assert policy.sweep(NUM_KEYS) == [1, 2]


def test_rows_before_the_user_speaks_do_not_count_as_a_question() -> None:
    policy = Phased(NUM_KEYS, NUM_EXPERTS)
    policy.begin(Phase.THINKING)
    policy.use([3])
    policy.begin(Phase.LISTENING)
    assert policy.sweep(NUM_KEYS) == []
    policy.begin(Phase.THINKING)
    policy.use([8])
    policy.begin(Phase.SPEAKING)
    policy.begin(Phase.LISTENING)
    assert policy.sweep(NUM_KEYS) == [8]


def test_the_questions_experts_score_higher_until_their_layer_has_passed() -> None:
    listen, speak = np.zeros((NUM_LAYERS, NUM_EXPERTS)), np.zeros((NUM_LAYERS, NUM_EXPERTS))
    listen[1, 0] = 1.0  # key 4
    speak[1, 1] = 0.1  # key 5
    policy = Phased(NUM_KEYS, NUM_EXPERTS, UseCounts(listen, speak))
    policy.begin(Phase.SPEAKING)
    assert least(policy, [5, 4]) == 4
    policy.begin(Phase.LISTENING)
    assert least(policy, [4, 5]) == 5
    policy.begin(Phase.THINKING)
    policy.use([0])
    assert least(policy, [4, 5]) == 5
    policy.use([6])
    assert least(policy, [4, 5]) == 4


def test_pinned_experts_score_highest() -> None:
    policy = Pinned(Lru(NUM_KEYS), [2])
    policy.use([2])
    policy.use([1])
    assert least(policy, [1, 2]) == 1
    assert scores(policy)[2] == np.inf


@pytest.mark.parametrize("name", POLICIES)
def test_an_expected_expert_scores_higher_than_one_used_once(name: str) -> None:
    policy = POLICIES[name](NUM_KEYS, NUM_EXPERTS, None)
    policy.begin(Phase.SPEAKING)
    policy.use([1])
    assert policy.expected_score(2) > scores(policy)[1]


@pytest.mark.parametrize("row", range(NUM_LAYERS))
def test_of_equally_used_experts_those_of_the_last_layer_score_lowest(row: int) -> None:
    """Layers repeat: the next layer runs soonest, the one that just ran last."""
    policy = Phased(NUM_KEYS, NUM_EXPERTS)
    policy.begin(Phase.THINKING)  # counts no use
    policy.use([row * NUM_EXPERTS])
    keys = range(0, NUM_KEYS, NUM_EXPERTS)
    by_score = sorted(keys, key=lambda key: -scores(policy)[key])
    rows = [key // NUM_EXPERTS for key in by_score]
    assert rows == [(row + 1 + ahead) % NUM_LAYERS for ahead in range(NUM_LAYERS)]
