"""Failing disks and damaged bytes: a second read corrects them, or an error names them."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.errors import ArtifactError, ExpertUnavailable
from tests.runtime.experts.records import (
    NUM_RECORDS,
    SLOT_BYTES,
    assert_right,
    open_pager,
    walk,
)


def failing(times: int, at: int, error: Exception | None) -> Callable[[int, memoryview], None]:
    """Reads of one record fail `times` times, with an error or a wrong byte."""
    left = [times]

    def fault(offset: int, buffer: memoryview) -> None:
        if offset == at * SLOT_BYTES and left[0]:
            left[0] -= 1
            raise error or OSError(errno.EIO, "Input/output error")

    return fault


def test_short_reads_are_continued(path: Path, records: list[ExpertRecord]) -> None:
    random = Random(5)

    def short(offset: int, buffer: memoryview) -> int:
        return random.choice([4096, 8192, 4096 + 100, len(buffer)])

    with open_pager(path, records, num_slots=6, fault=short, chunk_bytes=3 * 4096) as pager:
        walk(pager, num_steps=10, seed=1)
        assert pager.report()["retries"] == 0


def test_an_error_of_the_disk_is_retried_once(path: Path, records: list[ExpertRecord]) -> None:
    with open_pager(path, records, fault=failing(1, 9, None)) as pager:
        with pager.acquire(2, [1]) as lease:
            assert_right(pager, lease)
        assert pager.report()["retries"] == 1


def test_an_error_that_stays_names_file_and_record(path: Path, records: list[ExpertRecord]) -> None:
    with open_pager(path, records, num_slots=4, fault=failing(2, 9, None)) as pager:
        with pytest.raises(
            ExpertUnavailable,
            match=r"experts\.bin: layer 2, expert 1 cannot be read .*Input/output",
        ):
            pager.acquire(2, [0, 1, 2])
        assert pager.num_leased == 0
        with pager.acquire(2, [0, 1, 2]) as lease:  # the disk has recovered
            assert_right(pager, lease)


def test_any_error_of_a_read_is_raised_to_its_waiter(
    path: Path, records: list[ExpertRecord]
) -> None:
    fault = failing(2, 9, RuntimeError("the driver is gone"))
    with (
        open_pager(path, records, fault=fault) as pager,
        pytest.raises(ExpertUnavailable, match="the driver is gone"),
    ):
        pager.acquire(2, [1])


def test_damage_is_found_at_the_first_load_and_named(
    path: Path, records: list[ExpertRecord]
) -> None:
    content = bytearray(path.read_bytes())
    content[9 * SLOT_BYTES + 5] ^= 1
    path.write_bytes(content)
    with open_pager(path, records) as pager:
        pager.acquire(2, [0]).release()
        with pytest.raises(ExpertUnavailable, match=r"layer 2, expert 1 is damaged \(CRC-32"):
            pager.acquire(2, [1])
        assert pager.num_leased == 0


def test_damage_in_a_read_is_corrected_by_reading_again(
    path: Path, records: list[ExpertRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = []

    def flaky(content: memoryview) -> int:
        checks.append(1)
        return zlib_crc32(content) ^ (len(checks) == 1)

    zlib_crc32 = zlib.crc32
    monkeypatch.setattr("deeptalk_edge.runtime.experts.reader.zlib.crc32", flaky)
    with open_pager(path, records) as pager, pager.acquire(2, [1]) as lease:
        assert_right(pager, lease)
        assert len(checks) == 2


@pytest.mark.parametrize(("paranoid", "notices"), [(False, False), (True, True)])
def test_only_a_paranoid_pager_checks_every_load(
    path: Path, records: list[ExpertRecord], paranoid: bool, notices: bool
) -> None:
    with open_pager(path, records, num_slots=1, paranoid=paranoid) as pager:
        pager.acquire(2, [1]).release()
        pager.acquire(2, [0]).release()
        with path.open("r+b") as file:
            file.seek(9 * SLOT_BYTES)
            file.write(b"other")
        if notices:
            with pytest.raises(ExpertUnavailable, match="is damaged"):
                pager.acquire(2, [1])
        else:
            pager.acquire(2, [1]).release()


def test_a_file_that_shrank_is_an_error_and_not_a_crash(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records) as pager:
        path.open("r+b").truncate(9 * SLOT_BYTES)
        pager.acquire(2, [0]).release()
        with pytest.raises(
            ExpertUnavailable, match=r"layer 2, expert 1 cannot be read .*too early"
        ):
            pager.acquire(2, [1])


def test_a_failed_hint_does_not_affect_demands(path: Path, records: list[ExpertRecord]) -> None:
    with open_pager(path, records, num_slots=4, fault=failing(2, 9, None)) as pager:
        pager.hint(2, [1])
        pager.drain()
        assert pager.report()["failures"] == 1
        assert pager.residency.table.num_free == 4
        with pager.acquire(2, [1]) as lease:
            assert_right(pager, lease)


@pytest.mark.parametrize(
    "change", [{"bytes": SLOT_BYTES + 1}, {"offset": NUM_RECORDS * SLOT_BYTES}, {"offset": 512}]
)
def test_a_record_outside_the_file_or_larger_than_a_slot_is_refused_at_once(
    path: Path, records: list[ExpertRecord], change: dict[str, int]
) -> None:
    fields = {name: getattr(records[9], name) for name in records[9].__slots__} | change
    records[9] = ExpertRecord(**fields)
    with pytest.raises(ArtifactError, match="layer 2, expert 1 has"):
        open_pager(path, records)
