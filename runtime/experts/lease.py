"""Experts that somebody uses: what a pager hands out."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.experts.pool import Fence
from deeptalk_edge.runtime.experts.reader import Read

if TYPE_CHECKING:  # it makes them
    from deeptalk_edge.runtime.experts.pager import ExpertPager


class Lease:
    """Experts that stay where they are until `release`. A context manager."""

    __slots__ = ("_generations", "_pager", "layer", "reads", "slots")

    def __init__(
        self, pager: ExpertPager, layer: int, slots: dict[int, int], reads: list[Read]
    ) -> None:
        self.layer = layer
        self.slots = slots
        """Expert id to slot."""
        self.reads = reads
        """What must arrive first."""
        self._pager = pager
        table = pager.residency.table
        self._generations = [table.generations[slot] for slot in slots.values()]

    @property
    def experts(self) -> Sequence[int]:
        return list(self.slots)

    @property
    def addresses(self) -> NDArray[np.uint64]:
        """(E,) where each expert of the layer lies, 0 if absent; valid for the leased ones.

        Raises UsageError once the pager is closed.
        """
        return self._pager.addresses(self.layer)

    def address(self, expert: int) -> int:
        """Where one expert lies.

        Raises ValueError if it is not leased, or not any more, UsageError once the pager is closed.
        """
        if expert not in self.slots:
            raise ValueError(f"layer {self.layer}, expert {expert} is not leased")
        return self._pager.address(self.slots[expert])

    def release(self, fence: Fence | None = None) -> None:
        """Done with them, or done once the fence is. Doing it twice is doing it once."""
        slots, self.slots = self.slots, {}
        if slots:
            self._pager.end((list(slots.values()), self._generations), fence)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
