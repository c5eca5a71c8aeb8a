"""A microphone and a loudspeaker as the voice loop sees them: one port, two sample clocks.

in    16 kHz mono in frames of 20 ms, each with what the loudspeaker was handed meanwhile
out   mono at `rate_hz`; `write` queues, the device takes what it needs and hears silence if there
      is nothing
law   positions are counts of samples, never wall time. Silence that the port fills in is no
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
"""Of a `MicFrame`: 320."""

PLAY_RATE_HZ = 24000


class MicFrame(NamedTuple):
    """20 ms of the microphone."""

    pcm: Array
    """(320,) at 16 kHz."""
    far: Array
    """(320,) at 16 kHz: what the loudspeaker was handed in these 20 ms, zeros if nothing."""
    start: int
    """Microphone samples at 16 kHz since `open`, dropped ones included, before this frame."""
    num_waiting: int = 0
    """Frames that came after it and are not read yet: how far the reader is behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortCounters:
    """What a port has counted since it was made, reopenings included."""

    dropped_in: int = 0
    """Microphone samples lost because nobody read them in time."""
    underruns: int = 0
    """Times that the queue ran dry while an answer was being played: between a `write` and the
    `flush` or `finish` behind it."""
    overruns: int = 0
    """Input overflows that the device itself reported."""
    callbacks_in: int = 0
    callbacks_out: int = 0
    restarts: int = 0
    """Times that the device, or its loudspeaker alone, was started over."""


class SoundPort(Protocol):
    """A microphone and a loudspeaker. `read` to `close` belong to one thread; a lost device stays
    lost until `close` and `open`."""

    rate_hz: int
    """Of what is played."""

    def open(self) -> None:
        """Start both directions; all positions begin at 0.

        Raises DeviceLost, naming the device and those that there are, if one cannot be opened.
        """

    def read(self, timeout_s: float) -> MicFrame | None:
        """The next frame in order; None if none came in time.

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
        """Samples written and not yet handed to the device."""

    @property
    def handed(self) -> int:
        """Content samples handed to the device since `open`."""

    def audible(self) -> int:
        """Of those, samples heard by now: `handed` less what the device still buffers."""

    def flush(self) -> int:
        """Drop the queue behind a fade of 5 ms; returns what `handed` will be when the fade, which
        counts as heard, is out."""

    def set_gain(self, gain: float) -> None:
        """Play at a gain from 0 to 1, reached within 10 ms."""

    def counters(self) -> PortCounters:
        """What was counted so far."""

    def close(self) -> None:
        """Stop at once; harmless when it is closed already."""
