"""A running pool follows lasting changes of the available memory."""

from __future__ import annotations

import pytest

from deeptalk_edge.bundle.memory import RESERVE_BYTES
from deeptalk_edge.runtime.experts.sizing import (
    PLENTY_S,
    SEGMENT_SLOTS,
    SHORT_S,
    MemoryReading,
    MemoryWatch,
    is_short,
)

SLOT_BYTES = 4_595_712


@pytest.mark.parametrize(
    ("available_bytes", "stalled_percent", "short"),
    [
        (299_999_999, None, True),
        (300_000_000, None, False),
        (999_999_999, 5.1, True),
        (999_999_999, 5.0, False),
        (1_000_000_000, 80.0, False),
    ],
)
def test_memory_is_short_only_if_little_is_left_and_tasks_wait(
    available_bytes: int, stalled_percent: float | None, short: bool
) -> None:
    assert is_short(MemoryReading(available_bytes, stalled_percent)) is short


SHORT, ENOUGH = MemoryReading(10**8, None), MemoryReading(6 * 10**8, None)
PLENTY = MemoryReading(RESERVE_BYTES + SEGMENT_SLOTS * SLOT_BYTES, 0.0)


@pytest.mark.parametrize(
    ("readings", "changes"),
    [
        ([(0, SHORT), (SHORT_S - 1, SHORT), (SHORT_S, SHORT)], [0, 0, -SEGMENT_SLOTS]),
        ([(0, SHORT), (20, ENOUGH), (40, SHORT), (60, SHORT)], [0, 0, 0, 0]),
        ([(0, SHORT), (30, SHORT), (59, SHORT), (60, SHORT)], [0, -64, 0, -64]),
        ([(0, PLENTY), (PLENTY_S - 1, PLENTY), (PLENTY_S, PLENTY)], [0, 0, SEGMENT_SLOTS]),
        ([(0, SHORT), (30, PLENTY), (60, PLENTY), (90, PLENTY)], [0, 0, 0, 64]),
        ([(0, ENOUGH), (1000, ENOUGH)], [0, 0]),
    ],
)
def test_a_running_pool_follows_only_lasting_changes(
    readings: list[tuple[float, MemoryReading]], changes: list[int]
) -> None:
    watch = MemoryWatch(SLOT_BYTES)
    assert [watch.change(memory, 1000.0 + at_s) for at_s, memory in readings] == changes


def test_growing_leaves_the_reserve_free() -> None:
    watch = MemoryWatch(SLOT_BYTES)
    less = MemoryReading(PLENTY.available_bytes - 1, 0.0)
    stalled = MemoryReading(PLENTY.available_bytes + 10**9, 6.0)
    for memory in (less, stalled):
        assert [watch.change(memory, now_s) for now_s in (0.0, 1e6)] == [0, 0]
