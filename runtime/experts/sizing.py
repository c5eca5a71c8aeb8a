"""Size of the pool during a conversation; bundle/memory.py computes its initial size.

The size changes only between turns. The pool gives a segment back if memory has been short for
`SHORT_S`, and takes a segment that it gave back again if memory has been plenty for `PLENTY_S`. So
a short shortage evicts nothing, and every shrink can be undone.
"""

from __future__ import annotations

from deeptalk_edge.bundle.memory import RESERVE_BYTES
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.host import MemoryReading as MemoryReading
from deeptalk_edge.host import read_memory as read_memory

SEGMENT_SLOTS = 64
"""Slots of a segment, the step of a change."""

SHORT_S, PLENTY_S = 30.0, 60.0
"""Time that memory is short before a segment is given back, and plenty before one is taken."""

_SHORT_BYTES = 300_000_000
_AMPLE_BYTES = 1_000_000_000
_STALLED_PERCENT = 5.0


class MemoryWatch:
    """Decides whether a pool should shrink or grow, from readings between turns. It reads no
    clock."""

    def __init__(self, slot_bytes: int) -> None:
        self._segment_bytes = SEGMENT_SLOTS * slot_bytes
        self._trend, self._since_s = 0, 0.0

    def change(self, memory: MemoryReading, now_s: float) -> int:
        """Change of the number of slots: negative to shrink, positive to grow, 0 for neither."""
        trend = -1 if is_short(memory) else int(self._is_plenty(memory))
        if trend != self._trend:
            self._trend, self._since_s = trend, now_s
        if not trend or now_s - self._since_s < (SHORT_S if trend < 0 else PLENTY_S):
            return 0
        self._since_s = now_s  # one segment at a time
        return trend * SEGMENT_SLOTS

    def _is_plenty(self, memory: MemoryReading) -> bool:
        """Whether the reserve remains after taking a segment."""
        is_calm = (memory.stalled_percent or 0.0) <= _STALLED_PERCENT
        return is_calm and memory.available_bytes - self._segment_bytes >= RESERVE_BYTES


def is_short(memory: MemoryReading) -> bool:
    """Whether the system lacks memory that a pool could give back. If tasks stall although much is
    available, they wait for the page cache or in another control group, which a smaller pool does
    not change."""
    if memory.available_bytes < _SHORT_BYTES:
        return True
    is_stalled = (memory.stalled_percent or 0.0) > _STALLED_PERCENT
    return is_stalled and memory.available_bytes < _AMPLE_BYTES


def num_slots_of(pool: str, num_records: int) -> int:
    """Return the slots of a size such as `42%` or `700`.

    Raises SettingsError if that is not a valid size.
    """
    try:
        share = pool.endswith("%")
        slots = round(float(pool[:-1]) / 100 * num_records) if share else int(pool)
    except ValueError:
        raise SettingsError(
            f"pool {pool!r}: expected a number of experts or a share: 42%"
        ) from None
    if not 2 <= slots <= num_records:
        raise SettingsError(f"pool {pool!r}: expected 2 to {num_records} experts")
    return slots
