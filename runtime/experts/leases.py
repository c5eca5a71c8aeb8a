"""Experts that passes ask for: leased now, in waves, or guessed for later.

fence     a lease that kernels still read is released once its fence is done
room      who finds no slot waits for a read, a fence or another lease to end, whichever is first
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence

from deeptalk_edge.runtime.experts.lease import Addresses, Held, Lease
from deeptalk_edge.runtime.experts.loader import Loader
from deeptalk_edge.runtime.experts.pager_lock import PagerLock
from deeptalk_edge.runtime.experts.pool import Fence
from deeptalk_edge.runtime.experts.residency import Residency, waves_of
from deeptalk_edge.runtime.experts.telemetry import Telemetry


class Leases:
    """Of one pager, for any thread. What raises, raises as the pager's method of that name."""

    def __init__(
        self,
        lock: PagerLock,
        loader: Loader,
        residency: Residency,
        *,
        rows: Mapping[int, int],
        telemetry: Telemetry,
        wave_experts: int,
        released: Callable[[], None],
    ) -> None:
        """`rows` is each layer's row of `loader.addresses`; `released` is called, without the
        lock, when a lease has ended."""
        self._lock, self._loader, self._residency = lock, loader, residency
        self._telemetry, self._wave_experts, self._released = telemetry, wave_experts, released
        self._first_keys = {layer: row * residency.num_experts for layer, row in rows.items()}
        self._addresses_of: dict[int, Addresses] = {
            layer: loader.addresses[row] for layer, row in rows.items()
        }
        self._fenced: deque[tuple[Fence, Held]] = deque()
        self._num_waiting = 0  # for a slot

    def acquire(self, layer: int, experts: Sequence[int]) -> Lease:
        """Lease different experts of a layer; blocks until they are there."""
        return self._arrived(self._begin(layer, experts))

    def waves(self, layer: int, experts: Sequence[int]) -> Generator[Lease, None, None]:
        """Lease experts of a layer in ascending id, in groups; each lease ends with its turn.

        Close the generator if you may leave it early: it holds leases until then.
        """
        num_slots = self._residency.table.num_slots
        first, *groups = waves_of(experts, limit=self._wave_experts, num_slots=num_slots)
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
        base = self._first_keys[layer]
        keys = [base + expert for expert in experts]
        with self._lock:
            for load in self._residency.hint(keys):
                self._loader.load(load)

    def addresses(self, layer: int) -> Addresses:
        """(E,) where each expert of a layer lies, 0 if absent."""
        self._lock.check()
        return self._addresses_of[layer]

    def slots_change(self) -> None:
        """Wake, lock in hand, who waits for a slot: some may be free."""
        if self._num_waiting:
            self._lock.notify()

    def wait_for_fences(self) -> None:
        """Wait, without the lock, until no kernel reads what was released."""
        with self._lock.unchecked:
            fenced = list(self._fenced)
            self._fenced.clear()
        for fence, held in fenced:
            fence.wait()
            with self._lock.unchecked:
                self._release(held)

    def _take_back(self, held: Held, fence: Fence | None) -> None:
        """Take back a lease's slots, at once or once the fence is done."""
        if not self._lock.is_ours:  # a parent's lock may be held for ever
            return
        with self._lock.unchecked:
            if fence is None or fence.is_done():
                self._release(held)
            else:
                self._fenced.append((fence, held))
                self.slots_change()  # a thread that waits for a slot can wait for the fence
        self._released()

    def _begin(self, layer: int, experts: Sequence[int], later: Sequence[int] = ()) -> Lease:
        """Lease slots, as soon as there are enough, and queue what is missing. `later` are the
        layer's experts of the waves to come."""
        with self._lock:
            if len(experts) > self._residency.table.num_slots:
                raise ValueError(
                    f"{len(experts)} experts at once, the pool holds "
                    f"{self._residency.table.num_slots}: use waves"
                )
            while (lease := self._demand(layer, experts, later)) is None:
                if not self._loader.cancel_guesses(range(self._loader.addresses.size), set()):
                    self._await_room()
            return lease

    def _try_begin(self, layer: int, experts: Sequence[int], later: Sequence[int]) -> Lease | None:
        with self._lock:
            return self._demand(layer, experts, later)

    def _demand(self, layer: int, experts: Sequence[int], later: Sequence[int]) -> Lease | None:
        """One try, lock in hand."""
        base = self._first_keys[layer]
        keys = [base + expert for expert in experts]
        to_come = [base + expert for expert in later]
        table, reads = self._residency.table, self._loader.reads
        while self._fenced and self._fenced[0][0].is_done():
            self._release(self._fenced.popleft()[1])
        if reads:
            self._loader.cancel_guesses(
                range(base, base + self._residency.num_experts), {*keys, *to_come}
            )
        loads = self._residency.demand(keys, to_come)
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
                while any(not read.is_finished for read in lease.reads):
                    self._lock.wait()
                stall_ms = (time.perf_counter() - start_s) * 1000
                self._telemetry.stalled(self._residency.phase, stall_ms)
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
                self._lock.wait()
            finally:
                self._num_waiting -= 1
            return
        fence, held = self._fenced.popleft()
        self._lock.unchecked.release()
        try:
            fence.wait()
        finally:
            self._lock.unchecked.acquire()
        self._release(held)
        self._lock.expect_work()

    def _release(self, held: Held) -> None:
        self._residency.table.release(*held)
        self.slots_change()
