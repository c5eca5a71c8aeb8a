"""A microphone and a loudspeaker as the voice loop sees them: one port, two sample clocks.

in    16 kHz mono in frames of 20 ms, each with the sound that the loudspeaker was given in that
      time
out   mono at `rate_hz`; `write` queues, the device takes what it needs and gets silence from an
      empty queue
law   positions are counts of samples, never wall time. Silence that the port fills in is not
      content and moves no position
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.endpoint import FRAME_MS

Array = NDArray[np.float32]

FRAME_SAMPLES = RATE_HZ * FRAME_MS // 1000
"""Samples of a `MicFrame`: 320."""

PLAY_RATE_HZ = 24000


class MicFrame(NamedTuple):
    """20 ms of the microphone."""

    pcm: Array
    """(320,) at 16 kHz."""
    far: Array
    """(320,) at 16 kHz: sound given to the loudspeaker in these 20 ms, zeros if there was none."""
    start: int
    """Microphone samples at 16 kHz from `open` to this frame, dropped ones included."""
    num_waiting: int = 0
    """Later frames that are not read yet: the reader's lag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortCounters:
    """Counters of a port since it was made, reopenings included."""

    dropped_in: int = 0
    """Microphone samples lost because they were not read in time."""
    underruns: int = 0
    """Times that the queue ran dry while an answer was being played: between a `write` and the next
    `flush` or `finish`."""
    overruns: int = 0
    """Input overflows that the device itself reported."""
    callbacks_in: int = 0
    callbacks_out: int = 0
    restarts: int = 0
    """Restarts of the device, or of its loudspeaker alone."""


class SoundPort(Protocol):
    """A microphone and a loudspeaker. `read` to `close` belong to one thread; a lost device stays
    lost until `close` and `open`."""

    rate_hz: int
    """Rate of the sound to play."""

    def open(self) -> None:
        """Start both directions. All positions begin at 0.

        Raises DeviceLost, naming the device and those available, if one cannot be opened.
        """

    def read(self, timeout_s: float) -> MicFrame | None:
        """Return the next frame in order, or None if none came within `timeout_s`.

        Raises DeviceLost if the device is gone.
        """

    def write(self, pcm: Array) -> None:
        """Queue sound (N,); never blocks.

        Raises DoesNotFit if the queue would pass its bound.
        """

    def finish(self) -> None:
        """Nothing follows what was written: an empty queue is no underrun from now on."""

    @property
    def queued(self) -> int:
        """Samples written and not yet given to the device."""

    @property
    def handed(self) -> int:
        """Content samples given to the device since `open`."""

    def audible(self) -> int:
        """Samples of `handed` that have been heard: `handed` less the device's buffer."""

    def flush(self) -> int:
        """Drop the queue after a fade of 5 ms; returns the value of `handed` after the fade. The
        fade counts as heard."""

    def set_gain(self, gain: float) -> None:
        """Play at a gain from 0 to 1, reached within 10 ms."""

    def counters(self) -> PortCounters:
        """Return the counters so far."""

    def close(self) -> None:
        """Stop at once; idempotent."""
