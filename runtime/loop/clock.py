"""The microphone's clock, interpolated between frames.

Frames come late, never early. So the earliest arrival of the last two minutes, relative to its
sample, gives the time at which a sample is due; the wall clock gives the time since.
"""

from __future__ import annotations

import time
from typing import Protocol

from deeptalk_edge.model.features import RATE_HZ

_WINDOW = 60 * RATE_HZ


class SampleClock(Protocol):
    """Where the microphone is."""

    def arrived(self, sample: int) -> None:
        """The frame that ends there is here."""

    def now(self) -> int:
        """The sample that is due now."""


class WallClock:
    """Maps wall time to samples of the microphone."""

    def __init__(self) -> None:
        self._offset_s = self._recent_s = float("inf")
        self._window_end = 0

    def arrived(self, sample: int) -> None:
        """The frame that ends at `sample` has arrived."""
        offset_s = time.perf_counter() - sample / RATE_HZ
        if sample >= self._window_end:  # an old minimum would hide clock drift
            self._offset_s, self._recent_s = self._recent_s, offset_s
            self._window_end = sample + _WINDOW
        self._recent_s = min(self._recent_s, offset_s)

    def now(self) -> int:
        """Return the sample that is due now."""
        offset_s = min(self._offset_s, self._recent_s)
        return round((time.perf_counter() - offset_s) * RATE_HZ)


class FrameClock:
    """A clock for virtual time, which does not move between frames."""

    def __init__(self) -> None:
        self._sample = 0

    def arrived(self, sample: int) -> None:
        self._sample = sample

    def now(self) -> int:
        return self._sample
