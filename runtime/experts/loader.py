"""Loads experts into slots: it queues reads, handles their ends, and starts background loads.

lock      is the pager's: the caller of every method but `join` holds it
arrival   a loaded expert gets its address; an expert that cannot be read frees its slot
idle      when nothing is queued, the sweep of the experts that questions use continues; then free
          slots are filled
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.runtime.experts.idle_link import IdleLink
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.runtime.experts.pool import Pool
from deeptalk_edge.runtime.experts.reader import Read, RecordReader
from deeptalk_edge.runtime.experts.record_file import PAGE_BYTES, RecordSource
from deeptalk_edge.runtime.experts.residency import Load, Residency
from deeptalk_edge.runtime.experts.telemetry import Telemetry


class Loader:
    """Carries out the decisions of a `Residency`."""

    def __init__(
        self,
        records: Mapping[int, ExpertRecord],
        source: RecordSource,
        pool: Pool,
        residency: Residency,
        lock: threading.Lock,
        *,
        telemetry: Telemetry,
        settings: PagerSettings,
    ) -> None:
        """`records` has the record of each key.

        Raises ArtifactError if a record is not inside the source or does not fit a slot.
        """
        for record in records.values():
            _check(record, source, pool)
        self._pool, self._residency, self._telemetry = pool, residency, telemetry
        self._poison = settings.poison
        self.addresses = np.zeros((residency.num_layers, residency.num_experts), np.uint64)
        """Addresses (L, E) of the experts, 0 if absent."""
        self._address_of = self.addresses.reshape(-1)  # the same memory, by key
        self._idle_link = IdleLink(
            residency,
            np.array(list(records)),
            sweep_share=settings.sweep_share,
            fills=settings.fills,
        )
        self._reader = RecordReader(
            source,
            records,
            pool,
            lock,
            num_threads=settings.readers,
            chunk_bytes=settings.chunk_bytes,
            paranoid=settings.paranoid,
            idle=self._use_idle_link,
            finished=self._finished,
        )
        self.moved = self._reader.moved
        """Notified when a read has finished or reading has ended."""
        self.reads = self._reader.under_way
        """Reads under way, by key."""

    def start(self) -> None:
        """Start the threads. Raises BackendError if the system refuses all of them."""
        self._reader.start()

    @property
    def failure(self) -> BaseException | None:
        """Error that ended a thread, after which nothing is loaded; else None."""
        return self._reader.failure

    @property
    def is_idle(self) -> bool:
        """No read is under way, and no background load is planned."""
        return self._idle_link.is_done and self._reader.is_idle

    @property
    def num_retries(self) -> int:
        return self._reader.num_retries

    def load(self, load: Load) -> None:
        """Begin to load an expert into its slot."""
        if load.evicted is not None:
            self._address_of[load.evicted] = 0
        if self._poison:
            self._pool.poison(load.slot)
        self._reader.begin(load)

    def hurry(self, read: Read) -> None:
        """Turn the rest of a guess into a demand: the router chose its expert before it was
        loaded."""
        if not read.is_urgent:
            self._telemetry.num_late += 1
            self._reader.hurry(read)

    def cancel_guesses(self, keys: range, wanted: set[int]) -> bool:
        """Cancel guesses among `keys` that are too late; returns whether there were any."""
        loads = self._reader.cancel_guesses(keys, wanted)
        for load in loads:
            self._residency.cancel(load)
        return bool(loads)

    def discard(self, slot: int) -> None:
        """Give the memory of an empty slot back to the system."""
        self.addresses[self.addresses == self._pool.address(slot)] = 0
        self._pool.discard(slot)

    def enter(self, phase: Phase) -> None:
        """Another phase begins, with other background loads."""
        self._idle_link.enter(phase)
        if not self._idle_link.is_done:
            self._reader.wake()

    def plan_fill(self) -> None:
        """Plan to fill free slots: the link is idle for a while."""
        self._idle_link.plan_fill()
        self._reader.wake()

    def stop(self) -> None:
        """Begin no more reads."""
        self._reader.stop()

    def join(self) -> None:
        """Wait, without the lock, until all threads have stopped."""
        self._reader.join()

    def _finished(self, read: Read) -> None:
        """Handle the end of a read: the expert is loaded, or cannot be read."""
        load = read.load
        if read.error is None:
            self._telemetry.moved(load.cause, read.record.bytes)
            self._address_of[load.key] = self._pool.address(load.slot)
            self._residency.table.fill(load.slot)
        else:
            self._telemetry.num_failures += 1
            self._residency.fail(load)

    def _use_idle_link(self) -> bool:
        """Begin the next background loads; returns whether there were any."""
        if self._idle_link.is_done:
            return False
        for load in self._idle_link.next_loads():
            self.load(load)
        return True


def _check(record: ExpertRecord, source: RecordSource, pool: Pool) -> None:
    end = record.offset + record.bytes
    if record.offset % PAGE_BYTES or end > source.size_bytes or record.bytes > pool.slot_bytes:
        raise ArtifactError(
            f"{source.name}: layer {record.layer}, expert {record.expert} has {record.bytes} bytes "
            f"at {record.offset}; expected whole pages within {source.size_bytes} bytes, and slots "
            f"hold {pool.slot_bytes}; export the bundle again"
        )
