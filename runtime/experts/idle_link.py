"""Background loads for idle disk bandwidth: first the sweep of the experts that questions use, in
layer order, then experts for free slots."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.runtime.experts.residency import Cause, Load, Residency


class IdleLink:
    """Plans loads and returns them one at a time. The caller holds the pager's lock."""

    def __init__(
        self, residency: Residency, keys: NDArray[np.int64], *, sweep_share: float, fills: bool
    ) -> None:
        """`keys` are the keys of all records; a sweep takes at most `sweep_share` of the pool;
        without `fills`, free slots stay free."""
        self._residency, self._keys = residency, keys
        self._sweep_share, self._fills = sweep_share, fills
        self._sweep: deque[int] = deque()
        self._fill: deque[int] = deque()

    @property
    def is_done(self) -> bool:
        return not (self._sweep or self._fill)

    def enter(self, phase: Phase) -> None:
        """Begin another phase; the last phase's plan is dropped."""
        self._sweep.clear()
        self._fill.clear()
        if phase is Phase.LISTENING:
            room = int(self._residency.table.num_slots * self._sweep_share)
            self._sweep.extend(self._residency.plan_sweep(room))
            self.plan_fill()

    def plan_fill(self) -> None:
        """Plan to fill free slots: the link is idle for a while."""
        if self._fills:
            self._fill = deque(self._residency.plan_fill(self._keys))

    def next_loads(self) -> list[Load]:
        """Return the loads to begin now; none if the next expert is resident. Call while not
        done."""
        if self._sweep:
            return self._residency.hint([self._sweep.popleft()], Cause.SWEEP)
        load = self._residency.fill(self._fill.popleft())
        return [] if load is None else [load]
