"""A port on a virtual clock: each frame that is read advances the time by 20 ms.

For tests and simulations: deterministic and as fast as the machine allows. The microphone is a
function of time and can contain an echo of the loudspeaker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import DeviceLost
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.endpoint import FRAME_MS
from deeptalk_edge.runtime.audio.play_queue import PlayQueue, QueuedPort
from deeptalk_edge.runtime.audio.ports import (
    FRAME_SAMPLES,
    PLAY_RATE_HZ,
    MicFrame,
    PortCounters,
)
from deeptalk_edge.sound.rates import StreamResampler

Array = NDArray[np.float32]

Microphone = Callable[[int], Array]
"""Maps the position of a frame's first sample, counted since the port was made, to (320,)."""

_BLOCK_SAMPLES = PLAY_RATE_HZ * FRAME_MS // 1000


def recording(pcm: Array) -> Microphone:
    """A microphone that gives 16 kHz PCM (N,) and then silence."""

    def hear(start: int) -> Array:
        frame = pcm[start : start + FRAME_SAMPLES]
        return np.pad(frame, (0, FRAME_SAMPLES - len(frame)))

    return hear


@dataclass(frozen=True, slots=True, kw_only=True)
class EchoPath:
    """The echo path from the loudspeaker to the microphone."""

    gain: float
    delay_ms: int = 60
    """Time from giving a sample to the device to the frame that holds its echo."""


class VirtualPort(QueuedPort):
    """A deterministic `SoundPort`. Not thread-safe."""

    rate_hz = PLAY_RATE_HZ

    def __init__(
        self,
        microphone: Microphone,
        *,
        echo: EchoPath | None = None,
        device_ms: int = 40,
        queue_s: float = 2.0,
        on_played: Callable[[Array], None] | None = None,
    ) -> None:
        """`device_ms`, a multiple of a frame, is the loudspeaker's buffer; `on_played` gets each
        block of 480 samples that the device is given, silence included."""
        self._microphone, self._echo, self._on_played = microphone, echo, on_played
        super().__init__(PlayQueue(seconds=queue_s, block_samples=_BLOCK_SAMPLES))
        self._device_frames = device_ms // FRAME_MS
        self._passed = 0  # microphone samples since the port was made
        self._frames = self._restarts = 0
        self._lost: str | None = None
        self._is_open = False

    def open(self) -> None:
        if self._lost:
            raise DeviceLost(self._lost)
        self._restarts += self._frames > 0
        self._queue.rewind()
        self._start = 0
        self._far = StreamResampler(PLAY_RATE_HZ, RATE_HZ)
        self._block = np.zeros(_BLOCK_SAMPLES, np.float32)
        self._handed_before = deque([0] * (self._device_frames + 1), self._device_frames + 1)
        echo_samples = self._echo.delay_ms * RATE_HZ // 1000 if self._echo else 0
        self._in_the_air = np.zeros(echo_samples, np.float32)
        self._is_open = True

    def lose(self, reason: str = "virtual device: unplugged") -> None:
        """Make the device fail until `restore`."""
        self._lost = reason

    def restore(self) -> None:
        """Let the device be opened again."""
        self._lost = None

    def skip(self, num_frames: int) -> None:
        """Advance the time while the port is closed."""
        self._passed += num_frames * FRAME_SAMPLES

    def read(self, timeout_s: float) -> MicFrame | None:
        if self._lost or not self._is_open:
            self._is_open = False
            raise DeviceLost(self._lost or "virtual device: not open; open it again")
        self._queue.take(self._block)
        self._handed_before.append(self._queue.handed)
        if self._on_played:
            self._on_played(self._block.copy())
        far = self._far.push(self._block)
        pcm = self._microphone(self._passed)
        if self._echo:
            self._in_the_air = np.concatenate([self._in_the_air, self._echo.gain * far])
            pcm = pcm + self._in_the_air[:FRAME_SAMPLES]
            self._in_the_air = self._in_the_air[FRAME_SAMPLES:]
        frame = MicFrame(pcm, far, self._start)
        self._start += FRAME_SAMPLES
        self._passed += FRAME_SAMPLES
        self._frames += 1
        return frame

    def audible(self) -> int:
        return self._handed_before[0]

    def counters(self) -> PortCounters:
        return PortCounters(
            underruns=self._queue.num_underruns,
            callbacks_in=self._frames,
            callbacks_out=self._frames,
            restarts=self._restarts,
        )

    def close(self) -> None:
        self._is_open = False
