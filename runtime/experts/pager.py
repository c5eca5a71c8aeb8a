"""Loads experts into slots ahead of use; a lease blocks until its experts are loaded.

acquire   leases experts of one layer and blocks until their bytes are there; a miss waits, nothing
          is ever skipped or replaced
waves     the same for a union that may not fit: groups in ascending id, the next one loading while
          the last one computes
hint      a guess for a layer to come; never blocks, goes after every demand, and is cancelled if
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
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import Any

from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.lifetime import Lifetime
from deeptalk_edge.runtime.experts.lease import Addresses, Lease
from deeptalk_edge.runtime.experts.leases import Leases
from deeptalk_edge.runtime.experts.loader import Loader
from deeptalk_edge.runtime.experts.pager_lock import PagerLock
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import Phase, Policy
from deeptalk_edge.runtime.experts.pool import Pool
from deeptalk_edge.runtime.experts.pool_size import PoolSize
from deeptalk_edge.runtime.experts.record_file import RecordSource
from deeptalk_edge.runtime.experts.residency import Residency
from deeptalk_edge.runtime.experts.sizing import MemoryReading
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
        self.pool, self._source = pool, source
        self._lifetime = Lifetime(f"{source.name}: the pager", self._stop)
        try:
            self._open(records, policy, settings or PagerSettings())
        except BaseException:
            source.close()
            pool.close()
            raise

    def _open(
        self, records: Sequence[ExpertRecord], policy: Policy, settings: PagerSettings
    ) -> None:
        rows = {layer: row for row, layer in enumerate(sorted({r.layer for r in records}))}
        num_experts = 1 + max(record.expert for record in records)
        self._num_records = len(records)
        self.residency = Residency(
            num_layers=len(rows),
            num_experts=num_experts,
            num_slots=self.pool.num_slots,
            policy=policy,
        )
        self.telemetry = Telemetry()
        lock = threading.Lock()
        self._loader = Loader(
            {rows[r.layer] * num_experts + r.expert: r for r in records},
            self._source,
            self.pool,
            self.residency,
            lock,
            telemetry=self.telemetry,
            settings=settings,
        )
        self._lock = PagerLock(lock, self._lifetime, self._loader, self._source.name)
        self._leases = Leases(
            self._lock,
            self._loader,
            self.residency,
            rows=rows,
            telemetry=self.telemetry,
            wave_experts=settings.wave_experts,
            released=self._give_back,
        )
        self._size = PoolSize(
            self.pool, self.residency, self._loader, least_slots=settings.least_slots
        )
        self._reported = report(self.telemetry, self.residency)
        self._num_all_resident = 0  # passes under way that do not ask
        self._is_due = False  # source and pool are still to be given back
        self._loader.start()

    def acquire(self, layer: int, experts: Sequence[int]) -> Lease:
        """Lease different experts of a layer; blocks until they are there.

        Raises ExpertUnavailable, naming file and record, if one cannot be read or is damaged,
        ValueError if the pool can never hold so many at once, and like every other method
        UsageError if the pager is closed or another process's.
        """
        return self._leases.acquire(layer, experts)

    def waves(self, layer: int, experts: Sequence[int]) -> Generator[Lease, None, None]:
        """Lease experts of a layer in ascending id, in groups; each lease ends with its turn.

        Close the generator if you may leave it early: it holds leases until then.
        """
        return self._leases.waves(layer, experts)

    def hint(self, layer: int, experts: Sequence[int]) -> None:
        """Guess what a layer to come will need; never blocks."""
        self._leases.hint(layer, experts)

    @contextlib.contextmanager
    def all_resident(self) -> Generator[bool, None, None]:
        """Whether every expert is there: then all `addresses` hold for the block, and its uses are
        not counted one by one."""
        with self._lock:
            is_all_resident = self.has_all and not self._loader.reads
            self._num_all_resident += is_all_resident
            self.telemetry.num_all_resident += is_all_resident
        try:
            yield is_all_resident
        finally:
            with self._lock.unchecked:
                self._num_all_resident -= is_all_resident
            self._give_back()

    def enter(self, phase: Phase) -> None:
        """A pass of the model begins, or the conversation enters a phase."""
        with self._lock:
            is_new = phase is not self.residency.phase
            self.residency.begin(phase)
            if is_new:
                self._loader.enter(phase)

    def idle(self) -> None:
        """The conversation is idle."""
        self.enter(Phase.IDLE)
        with self._lock:
            self._loader.plan_fill()

    def drain(self) -> None:
        """Wait until all guesses are in; for what must not depend on timing."""
        with self._lock:
            while not self._loader.is_idle:
                self._lock.wait()

    def end_turn(self, memory: MemoryReading, now_s: float) -> dict[str, Any]:
        """Between turns: give memory back if the system has lacked it for a while, or take some
        again; returns the turn's counts. `now_s` is of a clock that never goes back."""
        with self._lock:
            given_back, taken = self._size.adapt(memory, now_s, is_fixed=self._num_all_resident > 0)
            if taken:
                self._leases.slots_change()
        if given_back:
            log.warning("memory is short: %d experts less are kept in memory", given_back)
        if taken:
            log.info("memory is there again: %d experts more are kept in memory", taken)
        now = self.report()
        counts, self._reported = since(now, self._reported), now
        self.idle()
        return counts | {"slots_given_back": given_back, "slots_taken_again": taken}

    def addresses(self, layer: int) -> Addresses:
        """(E,) where each expert of a layer lies, 0 if absent. A live view: lease, then read."""
        return self._leases.addresses(layer)

    @property
    def has_all(self) -> bool:
        """Whether every expert has a slot: nothing is left to guess."""
        return len(self.residency.table.slot_of) == self._num_records

    @property
    def num_leased(self) -> int:
        """Slots that a lease holds."""
        with self._lock:
            return self.residency.table.num_held

    def report(self) -> dict[str, Any]:
        """Everything counted so far."""
        with self._lock:
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

    def _stop(self) -> None:
        with self._lock.unchecked:
            self._loader.stop()
        self._loader.join()
        self._is_due = True
        self._give_back()

    def _give_back(self) -> None:
        """Close source and pool if that is due: the pager is closed, and no lease uses them."""
        if not self._is_due:
            return
        self._leases.wait_for_fences()
        with self._lock.unchecked:
            is_used = self._num_all_resident or self.residency.table.num_held
            if not self._is_due or is_used:
                return
            self._is_due = False
        self._loader.addresses[...] = 0
        self._source.close()
        self.pool.close()
