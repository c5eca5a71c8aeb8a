"""GPU time of an answer's stages by CUDA events: what the device took, not what a host waited."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Literal

Stage = Literal["encoder", "prefill", "step", "codec"]


class GpuStages:
    """Collects times between two calls of `begin`. One owner; not thread-safe."""

    def __init__(self) -> None:
        self._times: defaultdict[Stage, list[float]] = defaultdict(list)

    def begin(self) -> None:
        """An answer begins: forget the one before."""
        self._times.clear()

    def add(self, stage: Stage, ms: float) -> None:
        self._times[stage].append(ms)

    def summary(self) -> dict[str, float]:
        """Milliseconds: of a step the median, of every other stage all of it."""
        return {
            stage: median(times) if stage == "step" else sum(times)
            for stage, times in self._times.items()
        }
