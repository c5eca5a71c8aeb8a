"""A lease has the right bytes or raises an error with the reason, in any order of events."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.errors import UsageError
from deeptalk_edge.runtime.experts.lease import Lease
from deeptalk_edge.runtime.experts.pager_lock import PagerLock
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import POLICIES, Phase
from deeptalk_edge.runtime.experts.pool import CpuPool
from deeptalk_edge.runtime.experts.sizing import MemoryReading
from deeptalk_edge.runtime.experts.slots import SlotState
from tests.runtime.experts.records import (
    NUM_EXPERTS,
    NUM_RECORDS,
    SLOT_BYTES,
    Gate,
    assert_right,
    open_pager,
    shrink,
    sleepy,
    walk,
)


def test_the_table_of_addresses_is_0_for_absent_experts(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records, num_slots=2) as pager:
        lease = pager.acquire(2, [1, 6])
        table = lease.addresses
        assert table.dtype == np.uint64
        assert table.shape == (NUM_EXPERTS,)
        assert np.flatnonzero(table).tolist() == [1, 6]
        assert_right(pager, lease)
        lease.release()
        pager.acquire(3, [0]).release()
        assert np.count_nonzero(table) == 1
        with pytest.raises(ValueError, match="layer 2, expert 1 is not leased"):
            lease.address(1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_slots", [NUM_RECORDS, 21, 13, 8, 2])
def test_every_lease_holds_its_experts_bytes(
    path: Path, records: list[ExpertRecord], policy: str, num_slots: int
) -> None:
    with open_pager(path, records, num_slots=num_slots, policy=policy, poison=True) as pager:
        walk(pager, num_steps=25, seed=num_slots)
        assert pager.num_leased == 0


@pytest.mark.parametrize("seed", range(3))
def test_no_order_of_arrival_changes_a_byte(
    path: Path, records: list[ExpertRecord], seed: int
) -> None:
    fault = sleepy(0.001, seed)
    with open_pager(path, records, num_slots=9, policy="phased", fault=fault) as pager:
        walk(pager, num_steps=12, seed=seed)
        assert pager.num_leased == 0


def test_a_hint_whose_layer_has_passed_is_cancelled(
    path: Path, records: list[ExpertRecord]
) -> None:
    gate = Gate(8)
    with open_pager(path, records, fault=gate, readers=1) as pager:
        pager.hint(2, [0])
        assert gate.held.wait(20)
        pager.hint(2, [5, 6])  # after it, not begun
        threading.Timer(0.05, gate.opened.set).start()
        pager.acquire(2, [6]).release()
        pager.drain()
        report = pager.report()
        assert report["guesses_cancelled"] == 1
        assert report["guesses_late"] == 1
        assert report["moved_bytes"]["hint"] == 2 * records[0].bytes
        assert pager.addresses(2)[5] == 0


def test_a_demand_overtakes_hints(path: Path, records: list[ExpertRecord]) -> None:
    order: list[int] = []
    gate = Gate(8)

    def fault(offset: int, buffer: memoryview) -> None:
        order.append(offset // SLOT_BYTES)
        gate(offset, buffer)

    with open_pager(path, records, fault=fault, readers=1) as pager:
        pager.hint(2, [0, 1, 2])
        assert gate.held.wait(20)
        threading.Timer(0.05, gate.opened.set).start()
        pager.acquire(4, [7]).release()
        pager.drain()
    assert order[1:4] == [31, 31, 31]  # after the chunk under way, before its next one
    assert sorted(order[4:]) == [8, 8, 9, 9, 9, 10, 10, 10]


def test_a_demanded_hint_overtakes_earlier_hints(path: Path, records: list[ExpertRecord]) -> None:
    order: list[int] = []
    gate = Gate(8)

    def fault(offset: int, buffer: memoryview) -> None:
        order.append(offset // SLOT_BYTES)
        gate(offset, buffer)

    with open_pager(path, records, fault=fault, readers=1) as pager:
        pager.hint(2, [0, 1])
        assert gate.held.wait(20)
        pager.hint(4, [7])
        threading.Timer(0.05, gate.opened.set).start()
        with pager.acquire(4, [7]) as lease:
            assert_right(pager, lease)
        pager.drain()
        assert pager.report()["guesses_late"] == 1
    assert order == [8, 31, 31, 31, 8, 8, 9, 9, 9]


def test_listening_sweeps_the_experts_of_the_last_question(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records, num_slots=8, policy="phased") as pager:
        pager.enter(Phase.THINKING)
        pager.acquire(1, [2, 3]).release()
        pager.acquire(3, [4]).release()
        pager.enter(Phase.SPEAKING)
        for _ in range(5):
            pager.enter(Phase.SPEAKING)
            pager.acquire(2, range(8)).release()
        pager.enter(Phase.LISTENING)
        pager.drain()
        assert pager.report()["loads"]["sweep"] == 3
        pager.enter(Phase.THINKING)
        misses = pager.report()["misses"]
        pager.acquire(1, [2, 3]).release()
        pager.acquire(3, [4]).release()
        assert pager.report()["misses"] == misses


def test_more_experts_than_slots_are_refused_except_in_waves(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records, num_slots=3) as pager:
        with pytest.raises(ValueError, match="4 experts at once, the pool holds 3: use waves"):
            pager.acquire(1, [0, 1, 2, 3])
        seen = []
        for lease in pager.waves(1, [6, 0, 2, 5]):
            assert_right(pager, lease)
            seen += list(lease.slots)
        assert seen == [0, 2, 5, 6]


def test_waves_that_are_left_early_leave_no_lease(path: Path, records: list[ExpertRecord]) -> None:
    with open_pager(path, records, num_slots=4) as pager:
        waves: Iterator[Lease] = pager.waves(1, range(8))
        next(waves)
        assert pager.num_leased > 0
        del waves
        pager.drain()
        assert pager.num_leased == 0


def test_poison_makes_a_stale_read_visible(path: Path, records: list[ExpertRecord]) -> None:
    gate = Gate(1)
    with open_pager(path, records, num_slots=1, poison=True, fault=gate) as pager:
        pool = pager.pool
        assert isinstance(pool, CpuPool)
        lease = pager.acquire(1, [0])
        stale = pool.memory[lease.slots[0]].view(np.float32)
        assert np.isfinite(stale[:100]).all()
        lease.release()  # too early: `stale` is still in use
        pager.hint(1, [1])
        assert gate.held.wait(20)
        assert np.isnan(stale).all()
        gate.opened.set()


class Kernel:
    """A fence that the test completes."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def is_done(self) -> bool:
        return self.over.is_set()

    def wait(self) -> None:
        assert self.over.wait(20)


def test_a_slot_is_not_reused_before_its_fence(path: Path, records: list[ExpertRecord]) -> None:
    with open_pager(path, records, num_slots=1) as pager:
        kernel = Kernel()
        lease = pager.acquire(1, [0])
        slot = lease.slots[0]
        lease.release(kernel)
        assert pager.residency.table.state(slot) is SlotState.LEASED
        threading.Timer(0.05, kernel.over.set).start()
        with pager.acquire(1, [1]) as after:
            assert kernel.is_done()
            assert after.slots[1] == slot


def test_a_wait_for_a_slot_ends_when_one_is_released(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records, num_slots=2) as pager:
        held = pager.acquire(2, [1, 6])
        waiting = threading.Thread(target=lambda: pager.acquire(3, [0]).release())
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        held.release()
        waiting.join(10)
        assert not waiting.is_alive()


def test_two_sessions_never_mix_their_leases(path: Path, records: list[ExpertRecord]) -> None:
    failures: list[BaseException] = []

    def session(seed: int) -> None:
        try:
            walk(pager, num_steps=60, seed=seed)
        except BaseException as failure:
            failures.append(failure)

    with open_pager(path, records, num_slots=5, policy="phased", poison=True) as pager:
        threads = [threading.Thread(target=session, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert failures == []
        assert pager.num_leased == 0


def test_an_expert_with_two_holders_stays_until_both_release_it(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records, num_slots=1) as pager:
        one, other = pager.acquire(1, [0]), pager.acquire(1, [0])
        one.release()
        one.release()
        assert_right(pager, other)
        assert pager.residency.table.state(other.slots[0]) is SlotState.LEASED
        other.release()
        assert pager.num_leased == 0


def test_closing_during_a_read_ends_every_wait_and_thread(
    path: Path, records: list[ExpertRecord]
) -> None:
    gate, before = Gate(0), set(threading.enumerate())
    pager = open_pager(path, records, num_slots=4, fault=gate)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            pager.acquire(1, [0])
        except UsageError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert gate.held.wait(20)
    pager.hint(2, range(8))
    threading.Timer(0.05, gate.opened.set).start()
    pager.close()
    waiting.join(20)
    assert len(caught) == 1
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("expert-reader")]
    with pytest.raises(UsageError, match="the pager is closed"):
        pager.acquire(1, [0])
    pager.close()


def test_a_pool_shrinks_between_turns_and_no_further_than_allowed(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records, num_slots=8, least_slots=3) as pager:
        pager.acquire(1, range(8)).release()
        assert shrink(pager, 0) == 5
        assert np.count_nonzero(pager.addresses(1)) == 3
        walk(pager, num_steps=10, seed=0)
        assert pager.report()["slots"] == 3
        assert shrink(pager, 100) == 0


def test_a_turn_reports_its_own_counts(path: Path, records: list[ExpertRecord]) -> None:
    memory = MemoryReading(4 * 10**8, 0.0)
    with open_pager(path, records, num_slots=8) as pager:
        pager.acquire(1, [0, 1]).release()
        first = pager.end_turn(memory, 0.0)
        assert (first["misses"], first["slots"], first["slots_given_back"]) == (2, 8, 0)
        assert first["misses_by_layer"] == [2, 0, 0, 0]
        pager.acquire(1, [1, 2]).release()
        second = pager.end_turn(memory, 1.0)
        assert (second["hits"], second["misses"]) == (1, 1)
        assert second["moved_bytes"]["demand"] == records[0].bytes
        json.dumps(second)


def test_a_pool_shrinks_under_lasting_pressure_and_grows_again_after_it(
    path: Path, records: list[ExpertRecord], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    plenty, little = MemoryReading(10**9, 0.0), MemoryReading(10**8, 0.0)
    with open_pager(path, records, num_slots=8, least_slots=6) as pager:
        pager.acquire(1, range(8)).release()
        turns = [(little, 0), (plenty, 10), (little, 20), (little, 50), (plenty, 60), (plenty, 120)]
        counts = [pager.end_turn(memory, now_s) for memory, now_s in turns]
        assert [turn["slots_given_back"] for turn in counts] == [0, 0, 0, 2, 0, 0]
        assert [turn["slots_taken_again"] for turn in counts] == [0, 0, 0, 0, 0, 2]
        assert [turn["slots"] for turn in counts] == [8, 8, 8, 6, 6, 8]
        with pager.acquire(2, range(8)) as lease:
            assert_right(pager, lease)
    said = [message for message in caplog.messages if message.startswith("memory is")]
    assert said == [
        "memory is short: 2 experts less are kept in memory",
        "memory is there again: 2 experts more are kept in memory",
    ]


def test_a_pool_whose_memory_cannot_go_back_keeps_its_slots(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records, num_slots=8, least_slots=3) as pager:
        pager.pool.can_shrink = False
        assert shrink(pager, 0) == 0


@pytest.mark.parametrize(
    "wrong", [{"readers": 0}, {"wave_experts": 0}, {"sweep_share": 1.5}, {"chunk_bytes": 5000}]
)
def test_invalid_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PagerSettings(**wrong)  # type: ignore[arg-type]


def test_a_demand_without_a_free_slot_displaces_guesses(
    path: Path, records: list[ExpertRecord]
) -> None:
    gate = Gate(8)
    with open_pager(path, records, num_slots=3, fault=gate, readers=1) as pager:
        pager.hint(2, [0, 1, 2])
        assert gate.held.wait(20)
        threading.Timer(0.05, gate.opened.set).start()
        with pager.acquire(4, [6, 7]) as lease:
            assert_right(pager, lease)
        assert pager.report()["guesses_cancelled"] == 2


def test_an_interrupted_wait_leaves_no_lease(
    path: Path, records: list[ExpertRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(0)

    def interrupt(self: PagerLock) -> None:
        raise KeyboardInterrupt

    with open_pager(path, records, num_slots=4, fault=gate) as pager:
        with monkeypatch.context() as patch:
            patch.setattr(PagerLock, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                pager.acquire(1, [0, 1])
        assert pager.num_leased == 0
        gate.opened.set()
        with pager.acquire(1, [0, 1]) as lease:
            assert_right(pager, lease)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_smallest_and_the_largest_settings_are_accepted(share: float) -> None:
    settings = PagerSettings(readers=1, wave_experts=1, sweep_share=share)
    assert (settings.readers, settings.wave_experts) == (1, 1)
