"""The pool is sized from the remaining memory, never below the smallest pool that works."""

from __future__ import annotations

import logging

import pytest

from deeptalk_edge.bundle.memory import RESERVE_BYTES, least_slots, pool_slots
from deeptalk_edge.errors import DoesNotFit

SLOT_BYTES = 4_595_712


def slots(available_bytes: int) -> int:
    return pool_slots(
        num_records=1664,
        slot_bytes=SLOT_BYTES,
        num_layers=26,
        top_k=6,
        available_bytes=available_bytes,
    )


def test_everything_that_fits_is_kept() -> None:
    assert slots(9_000_000_000) == 1664
    assert slots(3_700_000_000) == (3_700_000_000 - RESERVE_BYTES) // SLOT_BYTES == 696


def test_less_than_two_layers_is_refused() -> None:
    least_bytes = RESERVE_BYTES + least_slots(6) * SLOT_BYTES
    assert slots(least_bytes) == 16
    with pytest.raises(DoesNotFit, match=r"16 experts take 0\.07 GB; free memory"):
        slots(least_bytes - 1)
    with pytest.raises(DoesNotFit):
        slots(0)


def test_a_pool_smaller_than_a_step_gives_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        slots(RESERVE_BYTES + 156 * SLOT_BYTES)
        assert not caplog.records
        slots(RESERVE_BYTES + 155 * SLOT_BYTES)
    assert "room for 155 experts, one step uses 156" in caplog.text
