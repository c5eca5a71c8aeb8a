"""Loads experts into slots ahead of use; a lease blocks until its experts are loaded.

acquire   leases experts of one layer and blocks until their bytes are there; a miss waits, nothing
          is ever skipped or replaced
waves     the same for a union that may not fit: groups in ascending id, the next one loading while
          the last one computes
hint      a guess for a layer to come; never blocks, goes behind every demand, and is cancelled if
          its layer passes before a byte of it moved
resident  `all_resident`: every expert is there; a pass runs without asking, and none leaves
          meanwhile
close     refuses every further call; what a pass or a lease still uses is given back with the last
          of them, and until then every address holds
enter     tells the phase; LISTENING begins a sweep of what questions use, in layer order; then, and
          while IDLE, free slots are filled if the settings say so

One lock guards `Residency`, which decides, and `Loader`, which brings; I/O and checksums run
outside it. Any number of sessions may share a pager; a session holds one lease, or two of `waves`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import Any

from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.errors import ExpertUnavailable
from deeptalk_edge.lifetime import Lifetime
from deeptalk_edge.runtime.experts.lease import Addresses, Held, Lease
from deeptalk_edge.runtime.experts.loader import Loader
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import Phase, Policy
from deeptalk_edge.runtime.experts.pool import Fence, Pool
from deeptalk_edge.runtime.experts.record_file import RecordSource
from deeptalk_edge.runtime.experts.residency import Residency, waves_of
from deeptalk_edge.runtime.experts.sizing import MemoryReading, MemoryWatch
from deeptalk_edge.runtime.experts.telemetry import Telemetry, report, since

log = logging.getLogger(__name__)


class ExpertPager:
    """Experts of one model in one pool."""

    def __init__(
        self,
        records: Sequence[ExpertRecord],
        source: RecordSource,
        pool: Pool,
        policy: Policy,
        settings: PagerSettings | None = None,
    ) -> None:
        """Start the reader threads. The pager owns source and pool from now on.

        Raises ArtifactError if a record does not lie in the source or fit a slot, BackendError if
        the system refuses every thread.
        """
        self.settings = settings or PagerSettings()
        self.pool, self._source = pool, source
        self._lifetime = Lifetime(f"{source.name}: the pager", self._stop)
        try:
            self._open(records, policy)
        except BaseException:
            source.close()
            pool.close()
            raise

    def _open(self, records: Sequence[ExpertRecord], policy: Policy) -> None:
        rows = {layer: row for row, layer in enumerate(sorted({r.layer for r in records}))}
        num_experts = 1 + max(record.expert for record in records)
        self._rows, self._num_experts, self._num_records = rows, num_experts, len(records)
        self.residency = Residency(
            num_layers=len(rows),
            num_experts=num_experts,
            num_slots=self.pool.num_slots,
            policy=policy,
        )
        self.telemetry = Telemetry()
        self._memory_watch = MemoryWatch(self.pool.slot_bytes)
        self._lock = threading.Lock()
        self._loader = Loader(
            {rows[r.layer] * num_experts + r.expert: r for r in records},
            self._source,
            self.pool,
            self.residency,
            self._lock,
            telemetry=self.telemetry,
            settings=self.settings,
        )
        self._addresses_of: dict[int, Addresses] = {
            layer: self._loader.addresses[row] for layer, row in rows.items()
        }
        self._fenced: deque[tuple[Fence, Held]] = deque()
        self._has_stopped = self._is_given_back = False
        self._reported = report(self.telemetry, self.residency)
        self._moved = self._loader.moved  # also when a slot is released that somebody waits for
        self._num_waiting = 0  # for a slot
        self._num_all_resident = 0  # passes under way that do not ask
        self._loader.start()

    def acquire(self, layer: int, experts: Sequence[int]) -> Lease:
        """Lease different experts of a layer; blocks until they are there.

        Raises ExpertUnavailable, naming file and record, if one cannot be read or is damaged,
        ValueError if the pool can never hold so many at once, and like every other method
        UsageError if the pager is closed or another process's.
        """
        return self._arrived(self._begin(layer, experts))

    def waves(self, layer: int, experts: Sequence[int]) -> Generator[Lease, None, None]:
        """Lease experts of a layer in ascending id, in groups; each lease ends with its turn.

        Close the generator if you may leave it early: it holds leases until then.
        """
        num_slots = self.residency.table.num_slots
        first, *groups = waves_of(experts, limit=self.settings.wave_experts, num_slots=num_slots)
        if not groups:  # nearly every step's
            lease = self._arrived(self._begin(layer, first))
            try:
                yield lease
            finally:
                lease.release()
            return
        later = [expert for group in groups for expert in group]
        with contextlib.ExitStack() as held:
            lease = held.enter_context(self._arrived(self._begin(layer, first, later)))
            for group in groups:
                later = later[len(group) :]
                # Not waiting here: two sessions that held one wave each would wait for ever.
                ahead = self._try_begin(layer, group, later)
                if ahead is not None:
                    held.enter_context(ahead)
                yield lease
                lease.release()
                if ahead is None:
                    ahead = held.enter_context(self._begin(layer, group, later))
                lease = self._arrived(ahead)
            yield lease

    def hint(self, layer: int, experts: Sequence[int]) -> None:
        """Guess what a layer to come will need; never blocks."""
        base = self._rows[layer] * self._num_experts
        keys = [base + expert for expert in experts]
        with self._asking():
            for load in self.residency.hint(keys):
                self._loader.load(load)

    @contextlib.contextmanager
    def all_resident(self) -> Generator[bool, None, None]:
        """Whether every expert is there: then all `addresses` hold for the block, and its uses are
        not counted one by one."""
        with self._asking():
            is_all_resident = self.has_all and not self._loader.reads
            self._num_all_resident += is_all_resident
            self.telemetry.num_all_resident += is_all_resident
        try:
            yield is_all_resident
        finally:
            with self._lock:
                self._num_all_resident -= is_all_resident
            self._give_back()

    def enter(self, phase: Phase) -> None:
        """A pass of the model begins, or the conversation enters a phase."""
        with self._asking():
            is_new = phase is not self.residency.phase
            self.residency.begin(phase)
            if is_new:
                self._loader.enter(phase)

    def idle(self) -> None:
        """Nobody talks."""
        self.enter(Phase.IDLE)
        with self._asking():
            self._loader.plan_fill()

    def drain(self) -> None:
        """Wait until all guesses are in; for what must not depend on timing."""
        with self._asking():
            while not self._loader.is_idle:
                self._wait()

    def end_turn(self, memory: MemoryReading, now_s: float) -> dict[str, Any]:
        """Between turns: give memory back if the system has lacked it for a while, or take some
        again; returns the turn's counts. `now_s` is of a clock that never goes back."""
        with self._asking():
            change = self._memory_watch.change(memory, now_s)
        given_back, taken = self.shrink(max(-change, 0)), self.grow(max(change, 0))
        if given_back:
            log.warning("memory is short: %d experts less are kept in memory", given_back)
        if taken:
            log.info("memory is there again: %d experts more are kept in memory", taken)
        now = self.report()
        counts, self._reported = since(now, self._reported), now
        self.idle()
        return counts | {"slots_given_back": given_back, "slots_taken_again": taken}

    def shrink(self, num_slots: int) -> int:
        """Give up to so many slots back; returns how many. Between turns; none while another
        session runs on every expert, or where the pool could not give their memory back."""
        with self._asking():
            if self._num_all_resident or not self.pool.can_shrink:
                return 0
            spare = max(self.residency.table.num_slots - self.settings.least_slots, 0)
            slots = self.residency.retire(min(num_slots, spare))
            for slot in slots:
                self._loader.discard(slot)
        return len(slots)

    def grow(self, num_slots: int) -> int:
        """Take up to so many slots again that were given back; returns how many."""
        with self._asking():
            table = self.residency.table
            taken = [slot for _ in range(num_slots) if (slot := table.reinstate()) is not None]
            if taken:
                self._slots_change()
        return len(taken)

    def addresses(self, layer: int) -> Addresses:
        """(E,) where each expert of a layer lies, 0 if absent. A live view: lease, then read."""
        self._lifetime.check()
        return self._addresses_of[layer]

    @property
    def has_all(self) -> bool:
        """Whether every expert has a slot: nothing is left to guess."""
        return len(self.residency.table.slot_of) == self._num_records

    @property
    def num_leased(self) -> int:
        """Slots that somebody holds."""
        with self._asking():
            return self.residency.table.num_held

    def report(self) -> dict[str, Any]:
        """Everything counted so far."""
        with self._asking():
            self.telemetry.num_retries = self._loader.num_retries
            return report(self.telemetry, self.residency)

    def close(self) -> None:
        """Stop reading, wherever it is, and refuse every further call. Source and pool are given
        back now, or with the last pass and lease that use them."""
        self._lifetime.close()

    def __enter__(self) -> ExpertPager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _take_back(self, held: Held, fence: Fence | None) -> None:
        """Take back a lease's slots, at once or once the fence is done."""
        if not self._lifetime.is_ours:  # a parent's lock may be held for ever
            return
        with self._lock:
            if fence is None or fence.is_done():
                self._release(held)
            else:
                self._fenced.append((fence, held))
                self._slots_change()  # whoever waits for a slot can wait for the fence
        self._give_back()

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """The lock, for what may be asked of a pager that works."""
        self._lifetime.check()  # before the lock, which a thread of a parent may hold for ever
        with self._lock:
            self._expect_work()
            yield

    def _expect_work(self) -> None:
        """Raises, lock in hand, if nothing that is waited for can come any more."""
        self._lifetime.check()
        failure = self._loader.failure
        if failure is not None:
            raise ExpertUnavailable(
                f"{self._source.name}: reading experts ended by a fault of ours "
                f"({type(failure).__name__}: {failure}); report it, and open the bundle again"
            ) from failure

    def _wait(self) -> None:
        """Wait, lock in hand, until something has moved."""
        self._moved.wait()
        self._expect_work()

    def _stop(self) -> None:
        with self._lock:
            self._loader.stop()
        self._loader.join()
        self._has_stopped = True
        self._give_back()

    def _give_back(self) -> None:
        """Close source and pool if that is due: the pager is closed, and nobody uses them."""
        if not self._has_stopped:
            return
        with self._lock:
            fenced = list(self._fenced)
            self._fenced.clear()
        for fence, held in fenced:
            fence.wait()
            with self._lock:
                self._release(held)
        with self._lock:
            if self._is_given_back or self._num_all_resident or self.residency.table.num_held:
                return
            self._is_given_back = True
        self._loader.addresses[...] = 0
        self._source.close()
        self.pool.close()

    def _begin(self, layer: int, experts: Sequence[int], later: Sequence[int] = ()) -> Lease:
        """Lease slots, as soon as there are enough, and queue what is missing. `later` are the
        layer's experts of the waves to come."""
        with self._asking():
            if len(experts) > self.residency.table.num_slots:
                raise ValueError(
                    f"{len(experts)} experts at once, the pool holds "
                    f"{self.residency.table.num_slots}: use waves"
                )
            while (lease := self._demand(layer, experts, later)) is None:
                if not self._loader.cancel_guesses(range(self._loader.addresses.size), set()):
                    self._await_room()
            return lease

    def _try_begin(self, layer: int, experts: Sequence[int], later: Sequence[int]) -> Lease | None:
        with self._asking():
            return self._demand(layer, experts, later)

    def _demand(self, layer: int, experts: Sequence[int], later: Sequence[int]) -> Lease | None:
        """One try, lock in hand."""
        self._expect_work()
        base = self._rows[layer] * self._num_experts
        keys = [base + expert for expert in experts]
        to_come = [base + expert for expert in later]
        table, reads = self.residency.table, self._loader.reads
        while self._fenced and self._fenced[0][0].is_done():
            self._release(self._fenced.popleft()[1])
        if reads:
            self._loader.cancel_guesses(range(base, base + self._num_experts), {*keys, *to_come})
        loads = self.residency.demand(keys, to_come)
        if loads is None:
            return None
        for load in loads:
            self._loader.load(load)
        awaited = [reads[key] for key in keys if key in reads] if reads else []
        for read in awaited:
            self._loader.hurry(read)
        slots = {expert: table.slot_of[base + expert] for expert in experts}
        return Lease(
            layer,
            slots,
            [table.generations[slot] for slot in slots.values()],
            awaited,
            addresses=self.addresses,
            release=self._take_back,
        )

    def _arrived(self, lease: Lease) -> Lease:
        """Wait for a lease's bytes."""
        if not lease.reads:
            return lease
        start_s = time.perf_counter()
        try:
            with self._lock:
                self._expect_work()
                while any(not read.is_finished for read in lease.reads):
                    self._wait()
                stall_ms = (time.perf_counter() - start_s) * 1000
                self.telemetry.stalled(self.residency.phase, stall_ms)
            for read in lease.reads:
                if read.error is not None:
                    raise read.error
        except BaseException:  # an interrupted wait, too
            lease.release()
            raise
        lease.reads = []
        return lease

    def _await_room(self) -> None:
        """Wait, lock in hand, until some slot may have become free."""
        if not self._fenced:
            self._num_waiting += 1
            try:
                self._wait()
            finally:
                self._num_waiting -= 1
            return
        fence, held = self._fenced.popleft()
        self._lock.release()
        try:
            fence.wait()
        finally:
            self._lock.acquire()
        self._release(held)

    def _release(self, held: Held) -> None:
        self.residency.table.release(*held)
        self._slots_change()

    def _slots_change(self) -> None:
        if self._num_waiting:
            self._moved.notify_all()
