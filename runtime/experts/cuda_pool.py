"""Pools for NVIDIA GPUs. Both read from disk straight into their host memory.

mapped   Jetson: host and GPU share the memory, so the GPU reads the slots that the disk filled
copied   RTX: slots in GPU memory, filled from pinned host memory on a separate stream; with a
         mirror, every record is read from disk once and stays pinned, and a miss is one copy
"""

from __future__ import annotations

import threading

from deeptalk_edge.lifetime import Lifetime
from deeptalk_edge.runtime.cuda import CudaRuntime
from deeptalk_edge.runtime.experts.pool import POISON, CpuPool, Landing


class MappedPool(CpuPool):
    """The CPU's arena, pinned and mapped: CPU and GPU use the same copy."""

    can_shrink = False

    def __init__(self, runtime: CudaRuntime, *, num_slots: int, slot_bytes: int) -> None:
        super().__init__(num_slots=num_slots, slot_bytes=slot_bytes)
        self._runtime, self._host = runtime, self._base
        runtime.register(self._host, num_slots * slot_bytes)
        self._base = runtime.device_pointer(self._host)

    def discard(self, slot: int) -> None:
        """Does nothing: `close` frees the pinned memory."""

    def _give_back(self) -> None:
        self._runtime.unregister(self._host)
        super()._give_back()


class CopiedPool:
    """Slots in GPU memory."""

    can_shrink = False

    def __init__(
        self,
        runtime: CudaRuntime,
        *,
        num_slots: int,
        slot_bytes: int,
        num_mirrored: int | None = None,
    ) -> None:
        """`num_mirrored` records are kept in pinned host memory; None keeps none and stages each
        load in a reused buffer."""
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        self._runtime = runtime
        self._arena = runtime.malloc(num_slots * slot_bytes)
        self._stream = runtime.make_stream()
        self._lock = threading.Lock()
        self._mirror = None if num_mirrored is None else self._pinned(num_mirrored)
        self._mirrored: set[int] = set()
        self._staging: list[CpuPool] = []
        self._idle: list[CpuPool] = []
        self._landed: dict[int, CpuPool] = {}  # staging buffers by slot
        self._lifetime = Lifetime("the pool", self._give_back)

    def landing(self, slot: int, key: int) -> Landing:
        if self._mirror is not None:
            return Landing(self._mirror.landing(key, key).buffer, key in self._mirrored)
        with self._lock:
            if not self._idle:
                self._staging.append(self._pinned(1))
                self._idle.append(self._staging[-1])
            self._landed[slot] = self._idle.pop()
            return self._landed[slot].landing(0, key)

    def settle(self, slot: int, key: int) -> None:
        if self._mirror is not None:
            source = self._mirror.address(key)
        else:
            source = self._landed[slot].address(0)
        runtime, event = self._runtime, self._runtime.make_event()
        try:
            runtime.copy_to_device(self.address(slot), source, self.slot_bytes, self._stream)
            runtime.record(event, self._stream)
            runtime.wait(event)
        finally:
            runtime.destroy_event(event)
        with self._lock:
            if self._mirror is not None:
                self._mirrored.add(key)
            else:
                self._idle.append(self._landed.pop(slot))

    def abandon(self, slot: int, key: int) -> None:
        with self._lock:
            if slot in self._landed:
                self._idle.append(self._landed.pop(slot))

    def address(self, slot: int) -> int:
        self._lifetime.check()
        return self._arena + slot * self.slot_bytes

    def poison(self, slot: int) -> None:
        self._runtime.memset(self.address(slot), POISON, self.slot_bytes)

    def discard(self, slot: int) -> None:
        """Does nothing: `close` frees the GPU memory."""

    def close(self) -> None:
        self._lifetime.close()

    def _give_back(self) -> None:
        self._runtime.destroy_stream(self._stream)
        self._runtime.free(self._arena)
        for pool in [*self._staging, *([self._mirror] if self._mirror else [])]:
            self._runtime.unregister(pool.address(0))
            pool.close()

    def _pinned(self, num_records: int) -> CpuPool:
        pool = CpuPool(num_slots=num_records, slot_bytes=self.slot_bytes)
        self._runtime.register(pool.address(0), num_records * self.slot_bytes)
        return pool
