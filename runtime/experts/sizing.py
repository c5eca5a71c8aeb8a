"""How large the pool may be: decided once, from what is free after everything else is loaded.

No control loop grows or shrinks it while somebody speaks. Between turns, and only under pressure,
it may give a segment back; that stays given back for the session.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from deeptalk_edge.errors import DoesNotFit, SettingsError

RESERVE_BYTES = 500_000_000
"""Left to the system and to what grows later."""

SEGMENT_SLOTS = 64
"""Given back at once under pressure."""

_PRESSURE_BYTES = 300_000_000
_PRESSURE_PERCENT = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """What the system says of its memory."""

    available_bytes: int
    """Of the machine, or what is left of the control group's limit if that is less."""
    stalled_percent: float | None
    """Share of the last 10 s in which some task waited for memory, if the kernel counts it."""

    @property
    def is_pressed(self) -> bool:
        stalled = self.stalled_percent is not None and self.stalled_percent > _PRESSURE_PERCENT
        return stalled or self.available_bytes < _PRESSURE_BYTES


def read_memory(root: Path = Path("/")) -> MemoryReading:
    """Read /proc and the control group below `root`.

    Raises DoesNotFit if the system does not say what is available.
    """
    meminfo = (root / "proc/meminfo").read_text(encoding="utf-8")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    if found is None:
        raise DoesNotFit(f"{root / 'proc/meminfo'}: no MemAvailable; name the pool's size instead")
    available = int(found[1]) * 1024
    groups = root / "sys/fs/cgroup"
    for limit, used in (
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ):
        if limit.is_file() and (most := limit.read_text().strip()).isdigit():
            available = min(available, int(most) - int(used.read_text()))
    pressure = root / "proc/pressure/memory"
    stalled = None
    if pressure.is_file() and (some := re.search(r"some avg10=([\d.]+)", pressure.read_text())):
        stalled = float(some[1])
    return MemoryReading(available, stalled)


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
