"""Queue of sound for the loudspeaker: one thread writes, the device's thread takes.

content   samples that were written. Positions count content, not the silence of an empty queue. A
          flush keeps 5 ms of content to fade out
gain      changes in ramps, so that ducking does not click; sound after silence fades in
lock      held for a few copies of at most one block; all memory is allocated at construction
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.runtime.audio.ports import PLAY_RATE_HZ

Array = NDArray[np.float32]

_RAMP_SAMPLES = PLAY_RATE_HZ * 5 // 1000  # of a fade; a gain ramp has its slope


class Taken(NamedTuple):
    """Content of one block; it is at the block's start, silence fills the rest."""

    start: int
    """Content samples before this block."""
    size: int


class PlayQueue:
    """A bounded queue of sound at `PLAY_RATE_HZ`. One writer, one taker."""

    def __init__(self, *, seconds: float, block_samples: int) -> None:
        """`block_samples` is the largest block of a `take`."""
        self._ring = np.zeros(int(seconds * PLAY_RATE_HZ), np.float32)
        self._ramp = np.arange(1, block_samples + 1, dtype=np.float32) / _RAMP_SAMPLES
        self._gains = np.empty(block_samples, np.float32)
        self._lock = threading.Lock()
        self.num_underruns = 0
        self._target = 1.0
        self.rewind()

    def rewind(self) -> None:
        """Clear everything but the count of underruns; positions begin at 0."""
        with self._lock:
            self._written = self._taken = 0
            self._fade_end = 0
            self._gain = 0.0
            self._is_playing = self._is_dry = False

    @property
    def queued(self) -> int:
        return self._written - self._taken

    @property
    def handed(self) -> int:
        """Content samples taken so far."""
        return self._taken

    def write(self, pcm: Array) -> None:
        """Append (N,).

        Raises DoesNotFit if the queue would pass its bound.
        """
        room = len(self._ring) - self.queued
        if len(pcm) > room:
            raise DoesNotFit(
                f"the loudspeaker's queue holds {len(self._ring)} samples and has room for {room}, "
                f"found {len(pcm)} more; write when `queued` is lower"
            )
        start = self._written % len(self._ring)
        first = min(len(pcm), len(self._ring) - start)
        self._ring[start : start + first] = pcm[:first]
        self._ring[: len(pcm) - first] = pcm[first:]
        with self._lock:
            self._written += len(pcm)
            self._is_playing, self._is_dry = True, False

    def finish(self) -> None:
        """Nothing follows the queued sound: an empty queue is no underrun from now on."""
        self._is_playing = False

    def set_gain(self, gain: float) -> None:
        self._target = gain

    def flush(self) -> int:
        """Drop the queue but 5 ms, which fade out; returns the value of `handed` after the fade."""
        with self._lock:
            self._written = self._fade_end = self._taken + min(self.queued, _RAMP_SAMPLES)
            self._is_playing = False
            return self._written

    def take(self, block: Array) -> Taken:
        """Fill a block (N,) for the device."""
        with self._lock:
            taken = Taken(self._taken, min(self.queued, len(block)))
            content = block[: taken.size]
            self._copy(content)
            block[taken.size :] = 0.0
            num_fading = max(self._fade_end - self._taken, 0)
            if num_fading:  # all of the fade: a block is longer
                self._fade(content[:num_fading])
            self._apply_gain(content[num_fading:])
            self._taken += taken.size
            if taken.size < len(block):
                self._gain = 0.0
                if self._is_playing and not self._is_dry:
                    self._is_dry = True
                    self.num_underruns += 1
        return taken

    def _copy(self, out: Array) -> None:
        """Copy the next samples without taking them."""
        start = self._taken % len(self._ring)
        first = min(len(out), len(self._ring) - start)
        out[:first] = self._ring[start : start + first]
        out[first:] = self._ring[: len(out) - first]

    def _fade(self, content: Array) -> None:
        content *= self._gain * (1 - self._ramp[: len(content)] * (_RAMP_SAMPLES / len(content)))
        self._gain = 0.0

    def _apply_gain(self, content: Array) -> None:
        if not len(content) or (self._gain == self._target == 1.0):
            return
        gains = self._gains[: len(content)]
        ramp = self._ramp[: len(content)]
        if self._gain <= self._target:
            np.minimum(self._gain + ramp, self._target, out=gains)
        else:
            np.maximum(self._gain - ramp, self._target, out=gains)
        content *= gains
        self._gain = float(gains[-1])


class QueuedPort:
    """The methods of a `SoundPort` that use only the play queue."""

    def __init__(self, queue: PlayQueue) -> None:
        self._queue = queue

    def write(self, pcm: Array) -> None:
        self._queue.write(pcm)

    def finish(self) -> None:
        self._queue.finish()

    @property
    def queued(self) -> int:
        return self._queue.queued

    @property
    def handed(self) -> int:
        return self._queue.handed

    def flush(self) -> int:
        return self._queue.flush()

    def set_gain(self, gain: float) -> None:
        self._queue.set_gain(gain)
