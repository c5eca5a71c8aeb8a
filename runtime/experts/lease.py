"""Leases: experts in use, which a pager must not evict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.experts.pool import Fence
from deeptalk_edge.runtime.experts.reader import Read

Held = tuple[list[int], list[int]]
"""Slots and the generation of each."""

Addresses = NDArray[np.uint64]


class Lease:
    """Experts that stay in their slots until `release`. A context manager."""

    __slots__ = ("_addresses", "_generations", "_release", "layer", "reads", "slots")

    def __init__(
        self,
        layer: int,
        slots: dict[int, int],
        generations: list[int],
        reads: list[Read],
        *,
        addresses: Callable[[int], Addresses],
        release: Callable[[Held, Fence | None], None],
    ) -> None:
        """`addresses` returns a layer's addresses (E,); `release` frees the slots."""
        self.layer = layer
        self.slots = slots
        """Expert id to slot."""
        self.reads = reads
        """Reads that must finish before the experts are used."""
        self._generations, self._addresses, self._release = generations, addresses, release

    @property
    def experts(self) -> Sequence[int]:
        return list(self.slots)

    @property
    def addresses(self) -> Addresses:
        """Addresses (E,) of the layer's experts, 0 if absent; valid for the leased ones.

        Raises UsageError once the pager is closed.
        """
        return self._addresses(self.layer)

    def address(self, expert: int) -> int:
        """Return the address of one expert.

        Raises ValueError if it is not leased or the lease has ended, UsageError once the pager is
        closed.
        """
        if expert not in self.slots:
            raise ValueError(f"layer {self.layer}, expert {expert} is not leased")
        return int(self.addresses[expert])

    def release(self, fence: Fence | None = None) -> None:
        """Release the slots now, or when `fence` completes. Idempotent."""
        slots, self.slots = self.slots, {}
        if slots:
            self._release((list(slots.values()), self._generations), fence)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
