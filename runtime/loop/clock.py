"""The microphone's clock, read between its frames.

Frames come late, never early: the earliest arrival of the last two minutes tells when a sample was
due, and the wall clock fills in what has passed since.
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
        """The frame that ends at `sample` is here."""
        offset_s = time.perf_counter() - sample / RATE_HZ
        if sample >= self._window_end:  # an old minimum would hide that the clocks drift apart
            self._offset_s, self._recent_s = self._recent_s, offset_s
            self._window_end = sample + _WINDOW
        self._recent_s = min(self._recent_s, offset_s)

    def now(self) -> int:
        """The sample that is due now."""
        offset_s = min(self._offset_s, self._recent_s)
        return round((time.perf_counter() - offset_s) * RATE_HZ)


class FrameClock:
    """Stands still between frames: for virtual time."""

    def __init__(self) -> None:
        self._sample = 0

    def arrived(self, sample: int) -> None:
        self._sample = sample

    def now(self) -> int:
        return self._sample
