"""How large the pool may be while it runs; bundle/memory.py says how large it is at first.

No control loop grows or shrinks it while somebody speaks. Between turns it gives a segment back if
memory has been short for `SHORT_S`, and takes one again, of those that it gave back, if there has
been plenty for `PLENTY_S`: a moment's pressure costs no experts, and none is lost for good.
"""

from __future__ import annotations

from deeptalk_edge.bundle.memory import RESERVE_BYTES
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.host import MemoryReading as MemoryReading
from deeptalk_edge.host import read_memory as read_memory

SEGMENT_SLOTS = 64
"""Given back or taken again at once."""

SHORT_S, PLENTY_S = 30.0, 60.0
"""How long memory is short before a segment goes, and how long there is plenty before one comes."""

_SHORT_BYTES = 300_000_000
_AMPLE_BYTES = 1_000_000_000
_STALLED_PERCENT = 5.0


class MemoryWatch:
    """Whether a running pool should shrink or grow, from readings between turns. No clock of its
    own."""

    def __init__(self, slot_bytes: int) -> None:
        self._segment_bytes = SEGMENT_SLOTS * slot_bytes
        self._trend, self._since_s = 0, 0.0

    def change(self, memory: MemoryReading, now_s: float) -> int:
        """Slots to give back, negative, or to take again; 0 leaves the pool as it is."""
        trend = -1 if is_short(memory) else int(self._is_plenty(memory))
        if trend != self._trend:
            self._trend, self._since_s = trend, now_s
        if not trend or now_s - self._since_s < (SHORT_S if trend < 0 else PLENTY_S):
            return 0
        self._since_s = now_s  # one segment, then it is watched afresh
        return trend * SEGMENT_SLOTS

    def _is_plenty(self, memory: MemoryReading) -> bool:
        """Whether a segment more leaves the reserve."""
        is_calm = (memory.stalled_percent or 0.0) <= _STALLED_PERCENT
        return is_calm and memory.available_bytes - self._segment_bytes >= RESERVE_BYTES


def is_short(memory: MemoryReading) -> bool:
    """Whether the system lacks memory that a pool could give back. Tasks that wait where much is
    available wait for the page cache, or in another control group: that is not ours to mend."""
    if memory.available_bytes < _SHORT_BYTES:
        return True
    is_stalled = (memory.stalled_percent or 0.0) > _STALLED_PERCENT
    return is_stalled and memory.available_bytes < _AMPLE_BYTES


def num_slots_of(pool: str, num_records: int) -> int:
    """Slots for `42%` or `700`.

    Raises SettingsError if that is no pool.
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
