"""Memory of resident experts: the protocol `Pool`, and `CpuPool`; `cuda_pool` has the GPUs' pools.

A pool is `num_slots` slots of `slot_bytes` each. The pager reads a record into `landing(slot, key)`
on one of its I/O threads, calls `settle(slot, key)` there, and then tells kernels `address(slot)`.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge import host
from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.lifetime import Lifetime

POISON = 0xFF
"""NaN in every float format that a record may hold."""


class Landing(NamedTuple):
    """Host memory that a record is read into."""

    buffer: memoryview
    has_content: bool
    """True if an earlier load's bytes are still there, so that nothing is read."""


class Fence(Protocol):
    """Work on a device that reads slots."""

    def is_done(self) -> bool:
        """Whether the work is done."""

    def wait(self) -> None:
        """Wait until the work is done."""


class Pool(Protocol):
    """Slots of memory. `landing` and `settle` of different slots run in several threads at once."""

    num_slots: int
    slot_bytes: int
    can_shrink: bool
    """Whether `discard` gives memory back while the pool is in use."""

    def landing(self, slot: int, key: int) -> Landing:
        """Return page-aligned host memory for the record `key` of the slot."""

    def settle(self, slot: int, key: int) -> None:
        """Called when the landing holds the whole record; returns once kernels may read the
        slot."""

    def abandon(self, slot: int, key: int) -> None:
        """Called instead of `settle` if the record could not be read."""

    def address(self, slot: int) -> int:
        """Address of the slot for kernels."""

    def poison(self, slot: int) -> None:
        """Overwrite an evicted slot with NaN."""

    def discard(self, slot: int) -> None:
        """Give the memory of a retired slot back to the system, where that is possible."""

    def close(self) -> None:
        """Release everything; called once, with no read in flight."""


class CpuPool:
    """One anonymous arena on huge pages; records are read straight into their slots."""

    can_shrink = True

    def __init__(self, *, num_slots: int, slot_bytes: int) -> None:
        """Reserve the arena; the system gives memory when a slot is first filled."""
        self.num_slots, self.slot_bytes = num_slots, slot_bytes
        try:
            self._arena = mmap.mmap(
                -1, num_slots * slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except OSError as error:
            raise DoesNotFit(
                f"a pool of {num_slots} experts takes {num_slots * slot_bytes / 1e9:.2f} GB; the "
                f"system refuses ({error.strerror}); ask for a smaller pool"
            ) from error
        host.ask_for_huge_pages(self._arena)
        self.memory: NDArray[np.uint8] = np.frombuffer(self._arena, np.uint8).reshape(
            num_slots, slot_bytes
        )
        """(S, slot_bytes)"""
        self._view = memoryview(self._arena)
        self._base = self.memory.ctypes.data
        self._lifetime = Lifetime("the pool", self._give_back)

    def landing(self, slot: int, key: int) -> Landing:
        self._lifetime.check()
        start = slot * self.slot_bytes
        return Landing(self._view[start : start + self.slot_bytes], has_content=False)

    def settle(self, slot: int, key: int) -> None:
        pass

    def abandon(self, slot: int, key: int) -> None:
        pass

    def address(self, slot: int) -> int:
        self._lifetime.check()
        return self._base + slot * self.slot_bytes

    def poison(self, slot: int) -> None:
        self._lifetime.check()
        self.memory[slot] = POISON

    def discard(self, slot: int) -> None:
        self._lifetime.check()
        host.give_memory_back(self._arena, slot * self.slot_bytes, self.slot_bytes)

    def close(self) -> None:
        """Unmap the arena; the memory is freed when its last view is dropped."""
        self._lifetime.close()

    def _give_back(self) -> None:
        self._view.release()
        del self.memory, self._arena
