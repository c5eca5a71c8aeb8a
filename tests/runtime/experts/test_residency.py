"""Residency decides which expert gets a slot and which is evicted, and counts."""

from __future__ import annotations

import pytest

from deeptalk_edge.runtime.experts.policy import Decayed, Lru, Phase, Pinned, Policy
from deeptalk_edge.runtime.experts.residency import Cause, Load, Residency, waves_of

NUM_LAYERS, NUM_EXPERTS = 2, 4


def pool_of(num_slots: int, policy: Policy | None = None) -> Residency:
    num_keys = NUM_LAYERS * NUM_EXPERTS
    return Residency(
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        num_slots=num_slots,
        policy=policy or Lru(num_keys),
    )


def settle(residency: Residency, loads: list[Load] | None) -> list[Load]:
    assert loads is not None
    for load in loads:
        residency.table.fill(load.slot)
    return loads


def ask(residency: Residency, *keys: int) -> list[int]:
    """Demand, wait and release; returns the missing experts."""
    loads = settle(residency, residency.demand(keys))
    for key in keys:
        slot = residency.table.slot_of[key]
        residency.table.release([slot], [residency.table.generations[slot]])
    return [load.key for load in loads]


def test_a_miss_takes_the_slot_with_the_lowest_score() -> None:
    residency = pool_of(2)
    assert ask(residency, 0) == [0]
    assert ask(residency, 1) == [1]
    assert ask(residency, 0) == []
    assert ask(residency, 2) == [2]
    assert set(residency.table.slot_of) == {0, 2}
    assert residency.hits.tolist() == [1, 0]
    assert residency.misses.tolist() == [3, 0]


def test_a_demand_without_enough_slots_changes_nothing() -> None:
    residency = pool_of(2)
    settle(residency, residency.demand([0, 1]))
    before = dict(residency.table.slot_of)
    assert residency.demand([1, 2]) is None
    assert residency.table.slot_of == before
    assert residency.misses.sum() == 2


def test_a_hint_does_not_evict_experts_with_higher_scores() -> None:
    residency = pool_of(2, Decayed(8, NUM_EXPERTS))
    for _ in range(100):
        residency.begin(Phase.SPEAKING)
        ask(residency, 0, 1)
    assert residency.hint([4]) == []
    for _ in range(100):
        residency.begin(Phase.SPEAKING)
        ask(residency, 0)
    assert [load.evicted for load in residency.hint([5])] == [1]


def test_a_hinted_expert_stays_until_its_layer_is_routed() -> None:
    residency = pool_of(3)
    ask(residency, 0)
    settle(residency, residency.hint([4]))
    ask(residency, 1)
    ask(residency, 2)
    ask(residency, 3)
    assert 4 in residency.table.slot_of
    ask(residency, 5)  # the layer of 4 was routed and 4 was not wanted
    ask(residency, 0)
    ask(residency, 1)
    assert 4 not in residency.table.slot_of
    assert residency.num_used == 0


@pytest.mark.parametrize(("phase", "stays"), [(Phase.THINKING, True), (Phase.SPEAKING, False)])
def test_swept_experts_stay_for_the_question_and_no_longer(phase: Phase, stays: bool) -> None:
    residency = pool_of(3)
    residency.begin(Phase.LISTENING)
    settle(residency, residency.hint([4]))
    residency.begin(phase)
    for key in (0, 1, 2):
        ask(residency, key)
    assert (4 in residency.table.slot_of) is stays


def test_a_demand_evicts_hinted_experts_if_no_others_are_left() -> None:
    residency = pool_of(1)
    settle(residency, residency.hint([4]))
    assert ask(residency, 0) == [0]


def test_a_demanded_hint_is_a_hit() -> None:
    residency = pool_of(4)
    settle(residency, residency.hint([4]))
    assert ask(residency, 4) == []
    assert residency.num_used == 1
    assert residency.num_loads == dict.fromkeys(Cause, 0) | {Cause.HINT: 1}


def test_a_later_wave_keeps_its_experts_while_an_earlier_one_loads() -> None:
    residency = pool_of(2)
    ask(residency, 3)
    ask(residency, 4)
    loads = residency.demand([0], later=[3])
    assert loads is not None
    assert [load.evicted for load in loads] == [4]


def test_pinned_experts_are_never_evicted() -> None:
    residency = pool_of(2, Pinned(Lru(8), [0]))
    for key in (0, 1, 2, 3, 4):
        ask(residency, key)
    assert 0 in residency.table.slot_of


def test_a_shrinking_pool_drops_the_lowest_scores_first() -> None:
    residency = pool_of(3)
    for key in (0, 1, 2):
        ask(residency, key)
    assert len(residency.retire(2)) == 2
    assert set(residency.table.slot_of) == {2}
    assert ask(residency, 1) == [1]
    assert residency.table.num_slots == 1


def test_two_waves_fit_the_pool() -> None:
    assert waves_of([5, 1, 3], limit=16, num_slots=4) == [[1, 3], [5]]
    assert waves_of([5, 1, 3], limit=16, num_slots=1) == [[1], [3], [5]]
    assert waves_of([5, 1, 3], limit=2, num_slots=64) == [[1, 3], [5]]
