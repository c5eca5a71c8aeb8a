"""How large the pool may be: at first from what is free after everything else is loaded.

No control loop grows or shrinks it while somebody speaks. Between turns it gives a segment back if
memory has been short for `SHORT_S`, and takes one again, of those that it gave back, if there has
been plenty for `PLENTY_S`: a moment's pressure costs no experts, and none is lost for good.
"""

from __future__ import annotations

import logging

from deeptalk_edge.errors import DoesNotFit, SettingsError
from deeptalk_edge.host import MemoryReading as MemoryReading
from deeptalk_edge.host import read_memory as read_memory

RESERVE_BYTES = 500_000_000
"""Left to the system and to what grows later."""

SEGMENT_SLOTS = 64
"""Given back or taken again at once."""

SHORT_S, PLENTY_S = 30.0, 60.0
"""How long memory is short before a segment goes, and how long there is plenty before one comes."""

_SHORT_BYTES = 300_000_000
_AMPLE_BYTES = 1_000_000_000
_STALLED_PERCENT = 5.0

log = logging.getLogger(__name__)


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


def least_slots(top_k: int) -> int:
    """Below this nothing runs: two layers' experts, and four on their way."""
    return 2 * top_k + 4


def pool_slots(
    *, num_records: int, slot_bytes: int, num_layers: int, top_k: int, available_bytes: int
) -> int:
    """Slots for a pool out of what is available now; all records if they fit.

    Raises DoesNotFit if not even the least pool does. Warns below one step's experts: there the
    pool forgets everything before it is asked again.
    """
    num_slots = min(num_records, max(available_bytes - RESERVE_BYTES, 0) // slot_bytes)
    least = min(least_slots(top_k), num_records)
    if num_slots < least:
        raise DoesNotFit(
            f"{available_bytes / 1e9:.2f} GB of memory are available; the system keeps "
            f"{RESERVE_BYTES / 1e9:.1f} GB and {least} experts take "
            f"{least * slot_bytes / 1e9:.2f} GB; free memory, or export with smaller experts"
        )
    if num_slots < min(num_layers * top_k, num_records):
        log.warning(
            "room for %d experts, one step uses %d: every step reads nearly all of its experts "
            "from disk; free memory, or export with smaller experts",
            num_slots,
            num_layers * top_k,
        )
    return num_slots


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
