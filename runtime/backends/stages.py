"""GPU time of an answer's stages by CUDA events: time on the device, not the host's wait."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Literal

Stage = Literal["encoder", "prefill", "step", "codec"]


class GpuStages:
    """Collects the times since the last `begin`. One owner; not thread-safe."""

    def __init__(self) -> None:
        self._times: defaultdict[Stage, list[float]] = defaultdict(list)

    def begin(self) -> None:
        """An answer begins: clear the last one's times."""
        self._times.clear()

    def add(self, stage: Stage, ms: float) -> None:
        self._times[stage].append(ms)

    def summary(self) -> dict[str, float]:
        """Milliseconds: the median of a step, the sum of every other stage."""
        return {
            stage: median(times) if stage == "step" else sum(times)
            for stage, times in self._times.items()
        }
