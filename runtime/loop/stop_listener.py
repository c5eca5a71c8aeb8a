"""Searches speech over an answer for stop words, outside of the audio thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.audio.stop_words import WordSpotter
from deeptalk_edge.runtime.loop.signals import StopWordHeard

Array = NDArray[np.float32]


class StopListener:
    """Owns a spotter. `begin` and `push` may run in another thread than `work`."""

    def __init__(self, spotter: WordSpotter, deliver: Callable[[StopWordHeard], None]) -> None:
        self._spotter, self._deliver = spotter, deliver
        self._heard: deque[int | Array] = deque()  # the start of a voice, or a piece of it
        self._voice: int | None = None  # start of the voice that is searched
        self.wake = threading.Event()
        """Set when there may be something to do."""

    def begin(self, voice: int) -> None:
        """A voice over the answer began at this sample; its sound follows."""
        self._heard.append(voice)

    def push(self, pcm: Array) -> None:
        """Take the voice's next piece (N,)."""
        self._heard.append(pcm)
        self.wake.set()

    def work(self) -> bool:
        """Search one piece; False if there is none."""
        if not self._heard:
            return False
        heard = self._heard.popleft()
        if isinstance(heard, int):
            self._spotter.begin()
            self._voice = heard
        elif self._voice is not None and self._spotter.hears(heard):
            self._deliver(StopWordHeard(self._voice))
            self._voice = None  # one word is enough
        return True
