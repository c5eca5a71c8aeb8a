"""Sample rates of a stream: blocks in, blocks out, nothing lost between them."""

from __future__ import annotations

import numpy as np
import soxr
from numpy.typing import NDArray

Array = NDArray[np.float32]

_TAPS = 49  # of the far end's filter at 48 kHz: half a millisecond late


class StreamResampler:
    """soxr over blocks of any size; up to 25 ms of a stream stay inside. One per stream."""

    def __init__(self, from_hz: int, to_hz: int) -> None:
        self._stream = None
        if from_hz != to_hz:
            self._stream = soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32")

    def push(self, pcm: Array) -> Array:
        """Take (N,); returns what is ready at the other rate."""
        if self._stream is None:
            return pcm
        out: Array = self._stream.resample_chunk(pcm)
        return out


class FarResampler:
    """24 kHz to 16 kHz, block by block and never late: 480 samples in, 320 out.

    An echo canceller must hear the loudspeaker before the microphone does; soxr holds more back
    than that allows. A windowed sinc of 7.5 kHz at the common 48 kHz.
    """

    def __init__(self) -> None:
        place = np.arange(_TAPS) - _TAPS // 2
        sinc = np.sinc(place * 7500 / 24000) * np.hamming(_TAPS)
        self._filter = (2 * sinc / sinc.sum()).astype(np.float32)
        self._before = np.zeros(_TAPS - 1, np.float32)

    def push(self, pcm: Array) -> Array:
        """Take (3N,) at 24 kHz; returns (2N,) at 16 kHz."""
        doubled = np.zeros(2 * len(pcm), np.float32)
        doubled[::2] = pcm
        doubled = np.concatenate([self._before, doubled])
        self._before = doubled[len(doubled) - _TAPS + 1 :]
        return np.convolve(doubled, self._filter, "valid")[::3]
