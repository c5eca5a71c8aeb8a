"""The microphone's recent sound, from which utterances are cut.

Sound is kept from the start of an utterance, or for 3 s without one. Positions are samples of the
microphone; samples that the device dropped are silence.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.features import RATE_HZ

Array = NDArray[np.float32]

_PAST = 3 * RATE_HZ  # pre-roll, and voice over an answer before it counts


class MicBuffer:
    """Keeps frames. One owner; not thread-safe."""

    def __init__(self) -> None:
        self._frames: deque[tuple[int, Array]] = deque()
        self._start: int | None = None

    def push(self, start: int, pcm: Array) -> None:
        """Take the frame (N,) that begins at `start`."""
        self._frames.append((start, pcm))
        keep_from = start - _PAST if self._start is None else self._start
        while self._frames[0][0] + len(self._frames[0][1]) <= keep_from:
            self._frames.popleft()

    def open(self, start: int) -> None:
        """An utterance begins at `start`."""
        self._start = start

    def drop(self) -> None:
        """The utterance is not needed any more."""
        self._start = None

    def utterance(self, end: int, *, longest: int) -> Array:
        """Return the open utterance up to `end`, (N,), at most its last `longest` samples."""
        assert self._start is not None
        return self.sound(max(self._start, end - longest), end)

    def sound(self, start: int, end: int) -> Array:
        """Return the sound in [start, end), (N,)."""
        pcm = np.zeros(end - start, np.float32)
        for place, frame in self._frames:
            first, last = max(place, start), min(place + len(frame), end)
            if first < last:
                pcm[first - start : last - start] = frame[first - place : last - place]
        return pcm
