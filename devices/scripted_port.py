"""A microphone that asks recorded questions one after the other, in real time: each when it is told
to, silence in between. The loudspeaker's sound is dropped."""

from __future__ import annotations

import threading
import time

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.audio.endpoint import FRAME_MS
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES, MicFrame
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort

Array = NDArray[np.float32]


class ScriptedPort(VirtualPort):
    """`ask` may be called by another thread than the one that reads."""

    def __init__(self) -> None:
        self._left = np.zeros(0, np.float32)
        self._lock = threading.Lock()
        self._due_s: float | None = None
        super().__init__(self._hear)

    def ask(self, pcm: Array) -> None:
        """Say 16 kHz PCM (N,) from the next frame on."""
        with self._lock:
            self._left = pcm

    def read(self, timeout_s: float) -> MicFrame | None:
        now_s = time.monotonic()
        due_s = now_s if self._due_s is None else self._due_s
        if due_s > now_s + timeout_s:
            time.sleep(timeout_s)
            return None
        time.sleep(max(due_s - now_s, 0.0))
        self._due_s = due_s + FRAME_MS / 1000
        return super().read(timeout_s)

    def _hear(self, start: int) -> Array:
        with self._lock:
            frame, self._left = self._left[:FRAME_SAMPLES], self._left[FRAME_SAMPLES:]
        return np.pad(frame, (0, FRAME_SAMPLES - len(frame)))
