"""Closing frees nothing that a pass or a lease uses, and ends every wait."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge import host
from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.errors import BackendError, EdgeError, ExpertUnavailable, UsageError
from deeptalk_edge.runtime.experts.idle_link import IdleLink
from deeptalk_edge.runtime.experts.pager import ExpertPager
from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.runtime.experts.pool import CpuPool
from deeptalk_edge.runtime.experts.record_file import RecordFile
from deeptalk_edge.runtime.experts.sizing import MemoryReading
from tests.runtime.experts.records import (
    LAYERS,
    SLOT_BYTES,
    Gate,
    harmless,
    leased_bytes,
    open_pager,
)

USES: dict[str, Callable[[ExpertPager], object]] = {
    "acquire": lambda pager: pager.acquire(1, [0]),
    "waves": lambda pager: list(pager.waves(1, [0])),
    "hint": lambda pager: pager.hint(1, [0]),
    "all_resident": lambda pager: pager.all_resident().__enter__(),
    "enter": lambda pager: pager.enter(Phase.SPEAKING),
    "idle": ExpertPager.idle,
    "drain": ExpertPager.drain,
    "end_turn": lambda pager: pager.end_turn(MemoryReading(10**9, 0.0), 0.0),
    "addresses": lambda pager: pager.addresses(1),
    "num_leased": lambda pager: pager.num_leased,
    "report": ExpertPager.report,
}


@pytest.mark.parametrize("name", USES)
def test_a_closed_pager_refuses_every_call(
    path: Path, records: list[ExpertRecord], name: str
) -> None:
    pager = open_pager(path, records, num_slots=4)
    pager.close()
    pager.close()
    with pytest.raises(UsageError, match="the pager is closed"):
        USES[name](pager)


def test_a_resident_pass_keeps_every_expert_until_it_ends(
    path: Path, records: list[ExpertRecord]
) -> None:
    pager = open_pager(path, records, fills=True)
    pager.idle()
    pager.drain()
    tables = [pager.addresses(layer) for layer in LAYERS]
    slot = pager.residency.table.slot_of[0]
    content = leased_bytes(pager, slot)
    with pager.all_resident() as is_all_resident:
        closing = threading.Thread(target=pager.close)
        closing.start()
        closing.join(20)
        assert not closing.is_alive()
        assert is_all_resident
        assert all(table.all() for table in tables)
        assert leased_bytes(pager, slot) == content
    assert not any(table.any() for table in tables)
    with pytest.raises(UsageError, match="the pool is closed"):
        pager.pool.address(0)


def test_after_close_a_lease_keeps_its_bytes_and_refuses_calls(
    path: Path, records: list[ExpertRecord]
) -> None:
    pager = open_pager(path, records, num_slots=4)
    lease, other = pager.acquire(1, [0]), pager.acquire(1, [0, 1])
    content = leased_bytes(pager, lease.slots[0])
    slot = lease.slots[0]
    pager.close()
    for question in (lambda: lease.address(0), lambda: lease.addresses):
        with pytest.raises(UsageError, match="the pager is closed"):
            question()
    lease.release()
    assert leased_bytes(pager, slot) == content
    other.release()
    with pytest.raises(UsageError, match="the pool is closed"):
        pager.pool.address(slot)


def test_close_waits_for_fences_before_it_frees_memory(
    path: Path, records: list[ExpertRecord]
) -> None:
    pager = open_pager(path, records, num_slots=4)
    waited: list[bool] = []

    class Kernel:
        def is_done(self) -> bool:
            return False

        def wait(self) -> None:
            waited.append(pager.pool.address(0) > 0)

    early, late = pager.acquire(1, [0]), pager.acquire(1, [1])
    early.release(Kernel())
    pager.close()
    late.release(Kernel())
    assert waited == [True, True]
    with pytest.raises(UsageError, match="the pool is closed"):
        pager.pool.address(0)


def test_closing_ends_a_drain(path: Path, records: list[ExpertRecord]) -> None:
    gate, caught = Gate(0), list[UsageError]()
    pager = open_pager(path, records, num_slots=4, fault=gate, readers=1)
    pager.hint(1, [0, 1, 2])  # of which two are never begun
    assert gate.held.wait(20)

    def drain() -> None:
        try:
            pager.drain()
        except UsageError as error:
            caught.append(error)

    draining = threading.Thread(target=drain, daemon=True)
    draining.start()
    threading.Timer(0.05, gate.opened.set).start()
    pager.close()
    draining.join(20)
    assert not draining.is_alive()
    assert len(caught) == 1


def test_a_closed_file_or_pool_touches_no_memory(path: Path, records: list[ExpertRecord]) -> None:
    file, pool = RecordFile(path), CpuPool(num_slots=2, slot_bytes=SLOT_BYTES)
    landing = pool.landing(0, 0)
    for thing in (file, pool):
        thing.close()
        thing.close()
    with pytest.raises(UsageError, match=r"experts\.bin is closed"):
        file.read_into(0, landing.buffer)
    for call in (pool.address, pool.poison, pool.discard):
        with pytest.raises(UsageError, match="the pool is closed"):
            call(0)
    landing.buffer[0] = 1  # a view keeps its memory


def fails_without_hanging(pager: ExpertPager) -> EdgeError:
    """Return the error of an acquire that has to wait."""
    caught: list[EdgeError] = []

    def acquire() -> None:
        try:
            pager.acquire(2, [1])
        except EdgeError as error:
            caught.append(error)

    waiting = threading.Thread(target=acquire, daemon=True)
    waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()
    return caught[0]


def test_an_error_in_the_check_of_a_record_is_raised_to_the_waiter(
    path: Path, records: list[ExpertRecord]
) -> None:
    records[9] = dataclasses.replace(records[9], crc32="x")  # type: ignore[arg-type]
    with open_pager(path, records, num_slots=4) as pager:
        error = fails_without_hanging(pager)
        assert "layer 2, expert 1" in str(error)
        assert isinstance(error.__cause__, ValueError)
        pager.acquire(2, [0]).release()  # the others can be read


def test_an_error_that_ends_a_reader_is_raised_to_present_and_later_waiters(
    path: Path, records: list[ExpertRecord]
) -> None:
    def die(offset: int, buffer: memoryview) -> None:
        raise SystemExit("the driver has had enough")

    with open_pager(path, records, num_slots=4, fault=die) as pager:
        for error in (fails_without_hanging(pager), fails_without_hanging(pager)):
            assert isinstance(error, ExpertUnavailable)
            assert "SystemExit: the driver has had enough" in str(error)
            assert isinstance(error.__cause__, SystemExit)
        with pytest.raises(ExpertUnavailable, match="SystemExit"):
            pager.drain()
        assert pager.residency.table.num_held == 0


def test_an_error_in_background_loads_is_raised_to_the_waiter(
    path: Path, records: list[ExpertRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: IdleLink) -> list[object]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(IdleLink, "next_loads", fail)
    with open_pager(path, records, num_slots=4, fills=True, readers=2) as pager:
        pager.idle()
        error = fails_without_hanging(pager)
        assert isinstance(error.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("num_given", [0, 1, 2])
def test_with_some_threads_refused_reading_works_and_with_all_it_is_an_error(
    path: Path,
    records: list[ExpertRecord],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    num_given: int,
) -> None:
    start, num_started = host.start_thread, [0]

    def refuse(thread: threading.Thread) -> None:
        if num_started[0] == num_given:
            raise BackendError("the system refuses to start the thread")
        num_started[0] += 1
        start(thread)

    monkeypatch.setattr(host, "start_thread", refuse)
    if num_given == 0:
        with pytest.raises(BackendError, match="refuses"):
            open_pager(path, records, num_slots=4, readers=4)
        return
    with open_pager(path, records, num_slots=4, readers=4, fault=harmless) as pager:
        pager.acquire(1, [0, 1]).release()
        assert np.count_nonzero(pager.addresses(1)) == 2
    assert [record.message for record in caplog.records] == [
        f"{num_given} of 4 threads read experts: the system refuses to start the thread"
    ]
