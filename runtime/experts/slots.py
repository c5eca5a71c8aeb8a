"""The slot table: which expert is in which slot, and whether it may be evicted.

    FREE -> LOADING -> READY <-> LEASED          READY -> FREE evicts, LOADING -> FREE gives up

A slot that is leased while it loads turns LEASED when its bytes are there. Only a READY slot may be
evicted. `generations[slot]` rises with every new expert, so that a holder of a slot number can
check that the slot still has the same expert. No I/O, no clock, no lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

import numpy as np
from numpy.typing import NDArray


class SlotState(Enum):
    """State of a slot."""

    FREE = "free"
    LOADING = "loading"
    READY = "ready"
    LEASED = "leased"


_FREE, _, _READY, _LEASED = SlotState  # enum look-ups took a tenth of a step


class SlotTable:
    """Slots and the keys in them. A key is any int that names one expert."""

    def __init__(self, num_slots: int) -> None:
        self.slot_of: dict[int, int] = {}
        """Key to slot, LOADING ones included."""
        self.keys: NDArray[np.int64] = np.zeros(num_slots, np.int64)
        """(S,) the key in each slot; meaningless where it is FREE."""
        self.is_ready: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)
        """(S,) where an expert may be evicted."""
        # The same memory as a view for single values, which is faster.
        self._is_ready_of = self.is_ready.view(np.uint8).data.cast("?")
        self.generations = [0] * num_slots
        self._states = [SlotState.FREE] * num_slots
        self._holders = [0] * num_slots
        self._free = list(reversed(range(num_slots)))
        self._retired: list[int] = []
        self.num_slots = num_slots
        """Slots in use; fewer while some are retired."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Number of leased slots, LOADING ones included."""
        return sum(holders > 0 for holders in self._holders)

    def state(self, slot: int) -> SlotState:
        return self._states[slot]

    def take(self, key: int) -> int:
        """Let a FREE slot begin to load `key`; returns the slot."""
        if key in self.slot_of or not self._free:
            raise ValueError(f"take({key}): it has a slot already, or none is free")
        slot = self._free.pop()
        self._states[slot] = SlotState.LOADING
        self.slot_of[key] = slot
        self.keys[slot] = key
        self.generations[slot] += 1
        return slot

    def fill(self, slot: int) -> None:
        """The bytes are there."""
        self._expect(slot, SlotState.LOADING, "fill")
        held = self._holders[slot] > 0
        self._states[slot] = SlotState.LEASED if held else SlotState.READY
        self.is_ready[slot] = not held

    def give_up(self, slot: int) -> None:
        """The bytes could not be read; leases of the slot are void."""
        self._expect(slot, SlotState.LOADING, "give_up")
        self._vacate(slot)

    def lease(self, slots: Iterable[int]) -> None:
        """Lease the slots; none is evicted until every holder has released it."""
        states, holders, is_ready = self._states, self._holders, self._is_ready_of
        for slot in slots:
            state = states[slot]
            if state is _FREE:
                raise ValueError(f"lease: slot {slot} is free")
            holders[slot] += 1
            if state is _READY:
                states[slot] = _LEASED
                is_ready[slot] = False

    def release(self, slots: Iterable[int], generations: Iterable[int]) -> None:
        """Release one holder's slots. A slot with a newer generation was given up since and is
        skipped."""
        states, holders, is_ready = self._states, self._holders, self._is_ready_of
        for slot, generation in zip(slots, generations, strict=True):
            state = states[slot]
            if self.generations[slot] != generation or state is _FREE:
                continue
            if holders[slot] == 0:
                raise ValueError(f"release: slot {slot} is not leased")
            holders[slot] -= 1
            if holders[slot] == 0 and state is _LEASED:
                states[slot] = _READY
                is_ready[slot] = True

    def evict(self, slot: int) -> None:
        """Remove the expert of a READY slot."""
        self._expect(slot, SlotState.READY, "evict")
        self._vacate(slot)

    def retire(self) -> int:
        """Take a FREE slot out of use; returns it."""
        slot = self._free.pop()
        self.num_slots -= 1
        self._retired.append(slot)
        return slot

    def reinstate(self) -> int | None:
        """Take a retired slot into use again; returns it, or None if there is none."""
        if not self._retired:
            return None
        slot = self._retired.pop()
        self.num_slots += 1
        self._free.append(slot)
        return slot

    def _vacate(self, slot: int) -> None:
        del self.slot_of[int(self.keys[slot])]
        self._states[slot] = SlotState.FREE
        self._holders[slot] = 0
        self.is_ready[slot] = False
        self._free.append(slot)

    def _expect(self, slot: int, state: SlotState, action: str) -> None:
        if self._states[slot] is not state:
            raise ValueError(f"{action}: slot {slot} is {self._states[slot].value}")
