"""What the link to the disk brings while nobody waits for it: first the sweep of what questions
use, in layer order, then experts for the slots that are free."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.runtime.experts.residency import Cause, Load, Residency


class IdleLink:
    """Plans and hands out, one expert at a time; whoever calls holds the pager's lock."""

    def __init__(
        self, residency: Residency, keys: NDArray[np.int64], *, sweep_share: float, fills: bool
    ) -> None:
        """`keys` are all records'; a sweep takes `sweep_share` of the pool at most, and without
        `fills` free slots stay free."""
        self._residency, self._keys = residency, keys
        self._sweep_share, self._fills = sweep_share, fills
        self._sweep: deque[int] = deque()
        self._fill: deque[int] = deque()

    @property
    def is_done(self) -> bool:
        return not (self._sweep or self._fill)

    def enter(self, phase: Phase) -> None:
        """Another phase has begun; what was planned for the last one is forgotten."""
        self._sweep.clear()
        self._fill.clear()
        if phase is Phase.LISTENING:
            room = int(self._residency.table.num_slots * self._sweep_share)
            self._sweep.extend(self._residency.plan_sweep(room))
            self.plan_fill()

    def plan_fill(self) -> None:
        """Nobody will need the link for a while."""
        if self._fills:
            self._fill = deque(self._residency.plan_fill(self._keys))

    def next_loads(self) -> list[Load]:
        """What to begin now; nothing if the next expert is there already. Call while not done."""
        if self._sweep:
            return self._residency.hint([self._sweep.popleft()], Cause.SWEEP)
        load = self._residency.fill(self._fill.popleft())
        return [] if load is None else [load]
