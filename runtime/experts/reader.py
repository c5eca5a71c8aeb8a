"""Threads that read records: demands before guesses, in chunks, with a check of every record.

chunk    records are read in chunks, so that all threads share a single miss, and a demand overtakes
         a partly read guess
check    CRC-32 when a record is first read, or always; a wrong record is read once more
failure  an error in one record fails only that read; an error that ends a thread ends all reading,
         and every present or later waiter gets it
sharing  the lock is the pager's, which holds it in every call; bytes are read without it
"""

from __future__ import annotations

import logging
import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deeptalk_edge import host
from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.errors import BackendError, ExpertUnavailable
from deeptalk_edge.runtime.experts.pool import Landing, Pool
from deeptalk_edge.runtime.experts.record_file import PAGE_BYTES, RecordSource
from deeptalk_edge.runtime.experts.residency import Cause, Load

log = logging.getLogger(__name__)


class Read:
    """A read of one record."""

    def __init__(self, load: Load, record: ExpertRecord, landing: Landing) -> None:
        self.load, self.record, self.landing = load, record, landing
        self.is_urgent = load.cause is Cause.DEMAND
        self.has_started = False
        self.is_finished = False
        self.num_pending = 0  # chunks that are not read
        self.failure: Exception | None = None
        self.error: ExpertUnavailable | None = None
        """Error of a finished read that failed; else None."""


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    read: Read
    start: int
    end: int


class RecordReader:
    """Reads records into a pool."""

    def __init__(
        self,
        source: RecordSource,
        records: Mapping[int, ExpertRecord],
        pool: Pool,
        lock: threading.Lock,
        *,
        num_threads: int,
        chunk_bytes: int,
        paranoid: bool,
        idle: Callable[[], bool],
        finished: Callable[[Read], None],
    ) -> None:
        """`idle` is called when nothing is queued and returns whether it began a read; `finished`
        is called with every read that has ended. The caller of both holds the lock."""
        self._source, self._records, self._pool = source, records, pool
        self._lock, self._chunk_bytes, self._paranoid = lock, chunk_bytes, paranoid
        self._idle, self._finished = idle, finished
        self.under_way: dict[int, Read] = {}
        """Reads by key, from `begin` until they are finished."""
        self.num_retries = 0
        self.failure: BaseException | None = None
        """Error that ended a thread, after which nothing is read; else None."""
        self.moved = threading.Condition(lock)
        """Notified when a read has finished or reading has ended."""
        self._work = threading.Condition(lock)
        self._urgent: deque[_Chunk] = deque()
        self._guesses: deque[_Chunk] = deque()
        self._num_busy = 0  # threads that read
        self._verified: set[int] = set()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._read_on, name=f"expert-reader-{i}", daemon=True)
            for i in range(num_threads)
        ]

    def start(self) -> None:
        """Start the threads, or as many as the system allows.

        Raises BackendError if it allows none.
        """
        for num_started, thread in enumerate(self._threads):
            try:
                host.start_thread(thread)
            except BackendError as error:
                if not num_started:
                    raise
                log.warning(
                    "%d of %d threads read experts: %s", num_started, len(self._threads), error
                )
                del self._threads[num_started:]
                return

    @property
    def is_idle(self) -> bool:
        return not (self.under_way or self._num_busy)

    def begin(self, load: Load) -> None:
        """Queue a record."""
        record = self._records[load.key]
        read = Read(load, record, self._pool.landing(load.slot, load.key))
        step = record.bytes if read.landing.has_content else self._chunk_bytes
        starts = range(0, record.bytes, step)
        read.num_pending = len(starts)
        self.under_way[load.key] = read
        queue = self._urgent if read.is_urgent else self._guesses
        queue.extend(_Chunk(read, start, start + step) for start in starts)
        self._work.notify(len(starts))

    def hurry(self, read: Read) -> None:
        """Turn the rest of a guess into a demand: the router chose its expert before it was
        loaded."""
        read.is_urgent = True
        self._urgent.extend(self._unqueued(read))

    def cancel_guesses(self, keys: range, wanted: set[int]) -> list[Load]:
        """Remove guesses among `keys` that are neither wanted nor under way; returns them."""
        idle = [
            read
            for key, read in self.under_way.items()
            if key in keys and key not in wanted and not (read.is_urgent or read.has_started)
        ]
        for read in idle:
            self._unqueued(read)
            del self.under_way[read.load.key]
            self._pool.abandon(read.load.slot, read.load.key)
        return [read.load for read in idle]

    def wake(self) -> None:
        """Wake idle threads: there may be a read to begin."""
        self._work.notify_all()

    def stop(self) -> None:
        """Begin no more chunks."""
        self._closed = True
        self._work.notify_all()
        self.moved.notify_all()

    def join(self) -> None:
        """Wait, without the lock, until all threads have stopped."""
        for thread in self._threads:
            thread.join()
        self.under_way.clear()
        self._urgent.clear()
        self._guesses.clear()

    def _unqueued(self, read: Read) -> list[_Chunk]:
        """Remove the rest of a guess from the queue."""
        chunks = [chunk for chunk in self._guesses if chunk.read is read]
        for chunk in chunks:
            self._guesses.remove(chunk)
        return chunks

    def _read_on(self) -> None:
        """Worker loop: read chunks until the reader closes."""
        try:
            while (chunk := self._next_chunk()) is not None:
                self._read(chunk)
        except BaseException as failure:
            with self._lock:
                self.failure = self.failure or failure
                self.stop()

    def _read(self, chunk: _Chunk) -> None:
        read = chunk.read
        try:
            if not read.landing.has_content and read.failure is None:
                self._fetch(read, chunk.start, chunk.end)
        except Exception as failure:  # raised to every waiter
            read.failure = failure
        with self._lock:
            read.num_pending -= 1
            is_last = read.num_pending == 0
        error = self._finish(read) if is_last else None
        with self._lock:
            if is_last:
                self._end(read, error)
            self._num_busy -= 1
            self.moved.notify_all()

    def _next_chunk(self) -> _Chunk | None:
        with self._lock:
            while not self._closed:
                if queue := self._urgent or self._guesses:
                    chunk = queue.popleft()
                    chunk.read.has_started = True
                    self._num_busy += 1
                    return chunk
                if not self._idle():
                    self.moved.notify_all()
                    self._work.wait()
        return None

    def _fetch(self, read: Read, start: int, end: int) -> None:
        """Read bytes [start, end) of a record, or to its end."""
        need = min(end, read.record.bytes)
        buffer = read.landing.buffer
        while start < need:
            got = self._source.read_into(read.record.offset + start, buffer[start:end])
            if start + got < need:  # continue at a whole page, for direct I/O
                got -= got % PAGE_BYTES
                if got == 0:
                    raise OSError("the file ends too early, or a read came back short")
            start += got

    def _finish(self, read: Read) -> ExpertUnavailable | None:
        """Check a whole record, read it again if it is wrong, and pass it to the pool."""
        try:
            return self._settle(read)
        except Exception as failure:  # of a device, or our bug: raised to every waiter
            error = ExpertUnavailable(f"{self._describe(read)}: {failure}")
            error.__cause__ = failure
            return error

    def _settle(self, read: Read) -> ExpertUnavailable | None:
        error = self._fault(read)
        if error is not None and not self._closed:
            self.num_retries += 1
            read.failure = None
            try:
                self._fetch(read, 0, self._pool.slot_bytes)
            except Exception as failure:
                read.failure = failure
            error = self._fault(read)
        if error is None:
            self._pool.settle(read.load.slot, read.load.key)
        return error

    def _end(self, read: Read, error: ExpertUnavailable | None) -> None:
        if error is None:
            self._verified.add(read.load.key)
        else:
            self._pool.abandon(read.load.slot, read.load.key)
        del self.under_way[read.load.key]
        read.error, read.is_finished = error, True
        self._finished(read)

    def _fault(self, read: Read) -> ExpertUnavailable | None:
        """Return the error of a record as it was read, or None."""
        if read.failure is not None:
            return ExpertUnavailable(
                f"{self._describe(read)} cannot be read ({read.failure}); check the disk, or copy "
                "the bundle again"
            )
        if read.load.key in self._verified and not self._paranoid:
            return None
        found = zlib.crc32(read.landing.buffer[: read.record.bytes])
        if found == read.record.crc32:
            return None
        return ExpertUnavailable(
            f"{self._describe(read)} is damaged (CRC-32 {found:08x}, expected "
            f"{read.record.crc32:08x}, read twice); copy the bundle again"
        )

    def _describe(self, read: Read) -> str:
        return f"{self._source.name}: layer {read.record.layer}, expert {read.record.expert}"
