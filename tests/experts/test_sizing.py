"""The pool is sized once, from what is left, and never below what runs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.runtime.experts.sizing import (
    RESERVE_BYTES,
    MemoryReading,
    least_slots,
    pool_slots,
    read_memory,
)

SLOT_BYTES = 4_595_712


def slots(available_bytes: int) -> int:
    return pool_slots(
        num_records=1664,
        slot_bytes=SLOT_BYTES,
        num_layers=26,
        top_k=6,
        available_bytes=available_bytes,
    )


def machine(root: Path, available_kb: int, **files: str) -> Path:
    for name, content in {"proc/meminfo": f"MemAvailable:   {available_kb} kB\n", **files}.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)
    return root


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


def test_less_than_a_step_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        slots(RESERVE_BYTES + 156 * SLOT_BYTES)
        assert not caplog.records
        slots(RESERVE_BYTES + 155 * SLOT_BYTES)
    assert "room for 155 experts, one step uses 156" in caplog.text


def test_a_control_group_bounds_what_is_available(tmp_path: Path) -> None:
    assert read_memory(machine(tmp_path, 4000)).available_bytes == 4_096_000
    group = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "50\n"}
    assert read_memory(machine(tmp_path, 4000, **group)).available_bytes == 4_096_000
    group["sys/fs/cgroup/memory.max"] = "1050\n"
    assert read_memory(machine(tmp_path, 4000, **group)).available_bytes == 1000


def test_pressure_is_little_memory_or_much_waiting(tmp_path: Path) -> None:
    pressure = {"proc/pressure/memory": "some avg10=7.50 avg60=0.00 avg300=0.00 total=1\n"}
    assert read_memory(machine(tmp_path, 4_000_000)).stalled_percent is None
    reading = read_memory(machine(tmp_path, 4_000_000, **pressure))
    assert reading.stalled_percent == 7.5
    assert reading.is_pressed
    assert MemoryReading(299_999_999, None).is_pressed
    assert not MemoryReading(300_000_000, 5.0).is_pressed


def test_a_system_that_does_not_say_is_refused(tmp_path: Path) -> None:
    machine(tmp_path, 1)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 5 kB\n")
    with pytest.raises(DoesNotFit, match="no MemAvailable"):
        read_memory(tmp_path)


def test_this_machine_says_what_it_has() -> None:
    assert read_memory().available_bytes > 0
