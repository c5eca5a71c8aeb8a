"""A slot has one expert, and leases keep it there."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deeptalk_edge.runtime.experts.slots import SlotState, SlotTable

NUM_SLOTS = 4


class Slots(RuleBasedStateMachine):
    """Random operations on slots, compared with a simple model."""

    def __init__(self) -> None:
        super().__init__()
        self.table = SlotTable(NUM_SLOTS)
        self.key_of: dict[int, int] = {}
        self.loading: set[int] = set()
        self.held: list[tuple[int, int]] = []

    @precondition(lambda self: len(self.key_of) < NUM_SLOTS)
    @rule(key=st.integers(0, 9))
    def take(self, key: int) -> None:
        if key in self.key_of.values():
            with pytest.raises(ValueError, match="has a slot already"):
                self.table.take(key)
            return
        slot = self.table.take(key)
        assert slot not in self.key_of
        self.key_of[slot] = key
        self.loading.add(slot)

    @precondition(lambda self: self.loading)
    @rule(arrives=st.booleans(), pick=st.randoms())
    def finish(self, arrives: bool, pick: object) -> None:
        slot = min(self.loading)
        self.loading.remove(slot)
        if arrives:
            self.table.fill(slot)
            return
        self.table.give_up(slot)
        del self.key_of[slot]

    @precondition(lambda self: self.key_of)
    @rule(number=st.integers(0, 9))
    def lease(self, number: int) -> None:
        slot = sorted(self.key_of)[number % len(self.key_of)]
        self.table.lease([slot])
        self.held.append((slot, self.table.generations[slot]))

    @precondition(lambda self: self.held)
    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        slot, generation = self.held.pop(number % len(self.held))
        self.table.release([slot], [generation])

    @rule(slot=st.integers(0, NUM_SLOTS - 1))
    def evict(self, slot: int) -> None:
        if self.table.state(slot) is SlotState.READY:
            self.table.evict(slot)
            del self.key_of[slot]
        else:
            with pytest.raises(ValueError, match="evict"):
                self.table.evict(slot)

    @invariant()
    def states_agree(self) -> None:
        assert self.table.slot_of == {key: slot for slot, key in self.key_of.items()}
        assert self.table.num_free == NUM_SLOTS - len(self.key_of)
        live = {slot for slot, generation in self.held if self.is_live(slot, generation)}
        assert self.table.num_held == len(live)
        for slot in range(NUM_SLOTS):
            if slot not in self.key_of:
                expected = SlotState.FREE
            elif slot in self.loading:
                expected = SlotState.LOADING
            else:
                expected = SlotState.LEASED if slot in live else SlotState.READY
            assert self.table.state(slot) is expected
            assert bool(self.table.is_ready[slot]) is (expected is SlotState.READY)

    def is_live(self, slot: int, generation: int) -> bool:
        """Leases of a slot that was given up are void."""
        return slot in self.key_of and self.table.generations[slot] == generation


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_free_slot_cannot_be_leased() -> None:
    with pytest.raises(ValueError, match="slot 0 is free"):
        SlotTable(1).lease([0])


def test_a_slot_leased_while_loading_is_leased_once_loaded() -> None:
    table = SlotTable(1)
    slot = table.take(7)
    table.lease([slot])
    assert table.state(slot) is SlotState.LOADING
    table.fill(slot)
    assert table.state(slot) is SlotState.LEASED


def test_a_late_release_does_not_touch_the_next_expert() -> None:
    table = SlotTable(1)
    slot = table.take(7)
    table.lease([slot])
    old = table.generations[slot]
    table.give_up(slot)
    table.take(8)
    table.lease([slot])
    table.fill(slot)
    table.release([slot], [old])
    assert table.state(slot) is SlotState.LEASED


def test_a_retired_slot_is_not_taken_until_it_is_reinstated() -> None:
    table = SlotTable(2)
    retired = table.retire()
    assert table.take(1) != retired
    assert table.num_slots == 1
    with pytest.raises(ValueError, match="none is free"):
        table.take(2)
    assert table.reinstate() == retired
    assert (table.take(2), table.num_slots) == (retired, 2)
    assert table.reinstate() is None
