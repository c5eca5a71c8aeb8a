"""The pager's decisions without its waits: which expert gets a slot, which is evicted, what is a
hit.

demand    the router chose these experts: each gets a slot, whatever must be evicted for it
hint      a guess: gets a slot only if one is free or holds an expert with a lower score
expected  hinted and swept experts whose layer has not been routed yet; they are evicted last
fill      loads without a request, because a used slot is better than an empty one

The pager runs this under its lock and moves real bytes; the simulator runs it without bytes. So
they agree on every hit, miss and byte. A hit is an expert that had a slot when it was demanded,
even if its bytes were still being read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.experts.policy import Phase, Policy
from deeptalk_edge.runtime.experts.slots import SlotTable


class Cause(Enum):
    """Reason of a load."""

    DEMAND = "demand"
    HINT = "hint"
    SWEEP = "sweep"
    FILL = "fill"


@dataclass(slots=True)
class Load:
    """A load of an expert into a slot."""

    key: int
    slot: int
    cause: Cause
    evicted: int | None
    """Key of the expert that was evicted for it."""


def waves_of(keys: Sequence[int], *, limit: int, num_slots: int) -> list[Sequence[int]]:
    """Return keys in ascending order, in waves small enough that two fit the pool: one computes
    while one loads."""
    size = max(1, min(limit, num_slots // 2))
    ordered = sorted(keys)
    if 0 < len(ordered) <= size:
        return [ordered]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


class Residency:
    """Decides which experts are in the pool. One owner; not thread-safe."""

    def __init__(
        self, *, num_layers: int, num_experts: int, num_slots: int, policy: Policy
    ) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.table = SlotTable(num_slots)
        self.policy = policy
        self.phase = Phase.IDLE
        self.expected = np.zeros(num_layers * num_experts, np.bool_)
        """Mask (L * E,) of experts that were hinted or swept and whose layer is not routed yet."""
        self._expected_rows: set[int] = set()  # layers that may have expected experts
        self.hits = np.zeros(num_layers, np.int64)
        self.misses = np.zeros(num_layers, np.int64)
        # The same memory as a view for single numbers, which is faster.
        self._hits_of, self._misses_of = self.hits.data, self.misses.data
        self.num_loads = dict.fromkeys(Cause, 0)
        self.num_used = 0
        """Number of hinted or swept experts that were then demanded."""
        self.num_cancelled = 0
        self.num_evicted = 0
        self._guessed: set[int] = set()  # resident by a hint or sweep and not demanded yet

    def begin(self, phase: Phase) -> None:
        """A pass of the model begins, or the conversation enters a phase."""
        if phase is not self.phase and phase is not Phase.THINKING:
            self.expected[:] = False
            self._expected_rows.clear()
        self.phase = phase
        self.policy.begin(phase)

    def demand(self, keys: Sequence[int], later: Sequence[int] = ()) -> list[Load] | None:
        """Lease these experts of one layer; returns the loads of the missing ones. `later` are the
        experts of the layer that are demanded next.

        Returns None and changes nothing if too many slots are leased or loading.
        """
        slot_of, table = self.table.slot_of, self.table
        row = keys[0] // self.num_experts
        slots = [slot_of[key] for key in keys if key in slot_of]
        num_missing = len(keys) - len(slots)
        if num_missing:
            held = int(table.is_ready[slots].sum())
            if table.num_free + int(table.is_ready.sum()) - held < num_missing:
                return None
        if row in self._expected_rows:
            self._expected_rows.remove(row)
            self.expected[row * self.num_experts : (row + 1) * self.num_experts] = False
        for key in later:
            self._expect(key)
        table.lease(slots)
        self._hits_of[row] += len(slots)
        if self._guessed:
            used = self._guessed.intersection(keys)
            self.num_used += len(used)
            self._guessed -= used
        self.policy.use(keys)
        if not num_missing:
            return []
        self._misses_of[row] += num_missing
        loads = [self._load(key, Cause.DEMAND) for key in keys if key not in slot_of]
        table.lease([load.slot for load in loads])
        return loads

    def hint(self, keys: Iterable[int], cause: Cause = Cause.HINT) -> list[Load]:
        """Expect these experts; returns the loads of those that get slots."""
        loads = []
        for key in keys:
            self._expect(key)
            if key in self.table.slot_of:
                continue
            score = self.policy.expected_score(key)
            if self.table.num_free or self._least(below=score) is not None:
                loads.append(self._load(key, cause))
                self._guessed.add(key)
        return loads

    def plan_sweep(self, num_slots: int) -> list[int]:
        """Expect the question's experts; returns those to hint one by one while the link is
        idle."""
        keys = self.policy.sweep(num_slots)
        for key in keys:
            self._expect(key)
        return [key for key in keys if key not in self.table.slot_of]

    def plan_fill(self, keys: NDArray[np.int64]) -> list[int]:
        """Return those of `keys` to fill free slots with, by falling score, then in layer order."""
        absent = keys[~np.isin(keys, list(self.table.slot_of))]
        best = np.argsort(-self.policy.score(absent), kind="stable")[: self.table.num_free]
        planned: list[int] = absent[best].tolist()
        return planned

    def fill(self, key: int) -> Load | None:
        """Return the load of `key` into a free slot, or None if it is not needed any more."""
        if key in self.table.slot_of or not self.table.num_free:
            return None
        return self._load(key, Cause.FILL)

    def cancel(self, load: Load) -> None:
        """Cancel a guess that is too late; its bytes are not read."""
        self.num_cancelled += 1
        self.num_loads[load.cause] -= 1
        self._guessed.discard(load.key)
        self.table.give_up(load.slot)

    def fail(self, load: Load) -> None:
        """The bytes could not be read."""
        self._guessed.discard(load.key)
        self.table.give_up(load.slot)

    def retire(self, num_slots: int) -> list[int]:
        """Take up to `num_slots` slots out of use, the lowest scores first; returns them."""
        retired = []
        for _ in range(num_slots):
            if not self.table.num_free:
                slot = self._least()
                if slot is None:
                    break
                self._evict(slot)
            retired.append(self.table.retire())
        return retired

    def _expect(self, key: int) -> None:
        self.expected[key] = True
        self._expected_rows.add(key // self.num_experts)

    def _load(self, key: int, cause: Cause) -> Load:
        evicted = None
        if not self.table.num_free:
            slot = self._least()
            assert slot is not None  # `demand` and `hint` have checked
            evicted = self._evict(slot)
        self.num_loads[cause] += 1
        return Load(key, self.table.take(key), cause, evicted)

    def _evict(self, slot: int) -> int:
        key = int(self.table.keys[slot])
        self._guessed.discard(key)
        self.num_evicted += 1
        self.table.evict(slot)
        return key

    def _least(self, below: float | None = None) -> int | None:
        """Return the READY slot with the lowest score; with `below`, only a slot with a lower score
        that is not expected."""
        ready = self.table.is_ready.nonzero()[0]
        if not len(ready):
            return None
        keys = self.table.keys[ready]
        expected = self.expected[keys]
        score = np.where(expected, np.inf, self.policy.score(keys))
        best = int(score.argmin())
        if below is not None:
            return int(ready[best]) if score[best] < below else None
        if score[best] == np.inf:  # only expected or pinned experts are left
            score = self.policy.score(keys)
            best = int(score.argmin())
        return int(ready[best])
