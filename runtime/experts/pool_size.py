"""How many slots a pager uses: fewer while the system lacks memory, never fewer than it needs."""

from __future__ import annotations

from deeptalk_edge.runtime.experts.loader import Loader
from deeptalk_edge.runtime.experts.pool import Pool
from deeptalk_edge.runtime.experts.residency import Residency
from deeptalk_edge.runtime.experts.sizing import MemoryReading, MemoryWatch


class PoolSize:
    """Changes between turns; the caller holds the pager's lock."""

    def __init__(
        self, pool: Pool, residency: Residency, loader: Loader, *, least_slots: int
    ) -> None:
        self._pool, self._residency, self._loader = pool, residency, loader
        self._least_slots = least_slots
        self._watch = MemoryWatch(pool.slot_bytes)

    def adapt(self, memory: MemoryReading, now_s: float, *, is_fixed: bool) -> tuple[int, int]:
        """Give slots back if the system has lacked memory for a while, or take some again; returns
        how many were given back and taken.

        None is given back while `is_fixed`, or where the pool could not give its memory back.
        """
        change = self._watch.change(memory, now_s)
        if change > 0:
            return 0, self._grow(change)
        if change < 0 and self._pool.can_shrink and not is_fixed:
            return self._shrink(-change), 0
        return 0, 0

    def _shrink(self, num_slots: int) -> int:
        spare = max(self._residency.table.num_slots - self._least_slots, 0)
        slots = self._residency.retire(min(num_slots, spare))
        for slot in slots:
            self._loader.discard(slot)
        return len(slots)

    def _grow(self, num_slots: int) -> int:
        table = self._residency.table
        return sum(table.reinstate() is not None for _ in range(num_slots))
