"""PCM for the model: float32, mono, full scale at 1.

scale      int16 arrays are divided by 2**15. Floats up to 1 stay, up to 4 are clipped with a
           warning, as mastered music overshoots; beyond that they are no float PCM at all, mostly
           16-bit values that were stored as floats, and are refused
channels   their mean; where they cancel each other, the loudest of them
"""

from __future__ import annotations

import logging
import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import AudioError

Array = NDArray[np.float32]
Pcm: TypeAlias = NDArray[np.floating[Any]] | NDArray[np.int16]
"""What a caller may hand over: samples (N,)."""

_MAX_PEAK = 4.0
_CANCELLED = 0.25  # of the power that unrelated channels leave in their mean: 6 dB are lost
_MEMORY = 0.9  # of a stream's power from block to block: 20 ms each

log = logging.getLogger(__name__)


def as_pcm(samples: object) -> Array:
    """A caller's mono PCM as float32 (N,); int16 is scaled.

    Raises AudioError if it is no array of floats or int16, is empty or not mono, holds NaN, or runs
    far beyond full scale.
    """
    if not isinstance(samples, np.ndarray) or not _is_pcm_type(samples.dtype):
        found = type(samples).__name__
        if isinstance(samples, np.ndarray):
            found = f"an array of {samples.dtype}"
        raise AudioError(
            "a question is text, or 16 kHz PCM as an array (N,) of int16, or of float32 from -1 to "
            f"1; found {found}; numpy.asarray(samples, numpy.float32) makes one of a list of floats"
        )
    if samples.ndim != 1 or not samples.size:
        raise AudioError(f"expected mono PCM with at least one sample, found shape {samples.shape}")
    if samples.dtype.kind == "i":
        samples = samples.astype(np.float32) / 2**15
    return within_scale(samples, "the PCM")


def within_scale(samples: NDArray[np.floating], source: str) -> Array:
    """Samples of any shape as float32 within -1 and 1.

    Raises AudioError, naming `source`, if they are not finite or exceed 4.
    """
    peak = float(np.abs(samples).max(initial=0.0))
    if not math.isfinite(peak):
        raise AudioError(f"{source}: NaN or infinite samples; repair the recording")
    if peak > _MAX_PEAK:
        raise AudioError(
            f"{source}: float samples reach {peak:g}, and full scale is 1; divide 16-bit values by "
            "32768, or turn the recording down"
        )
    if peak > 1:
        log.warning("%s: samples reach %.2f, and full scale is 1; clipped", source, peak)
        samples = samples.clip(-1, 1)
    return np.asarray(samples, np.float32)


def as_int16(pcm: Array) -> NDArray[np.int16]:
    """PCM of any shape as 16-bit values; what exceeds full scale is clipped, and never wraps."""
    return np.rint(np.clip(pcm, -1.0, 1.0) * 32767).astype("<i2")


class Downmix:
    """The channels of one stream to mono. Not thread-safe.

    A balanced line on a stereo plug, or a reversed wire, gives two channels whose mean is silence.
    Then the loudest channel is chosen, for good: changing back and forth would click.
    """

    def __init__(self, source: str) -> None:
        """`source` is who the stream is from, for the log."""
        self._source = source
        self._channel: int | None = None
        self._power_of_mean = 0.0
        self._powers = np.zeros(())  # of the channels

    def push(self, wide: Array) -> Array:
        """Take (N, channels); returns (N,)."""
        if wide.shape[1] == 1:
            return wide[:, 0]
        mono: Array = wide.mean(axis=1, dtype=np.float32)
        if self._channel is None:
            self._watch(wide, mono)
        return mono if self._channel is None else wide[:, self._channel].copy()

    def _watch(self, wide: Array, mono: Array) -> None:
        """Choose a channel if the mean has lost what the channels hold."""
        self._power_of_mean = _MEMORY * self._power_of_mean + float(_power(mono[:, None])[0])
        self._powers = _MEMORY * self._powers + _power(wide)
        unrelated = float(self._powers.sum()) / wide.shape[1] ** 2
        if self._power_of_mean < _CANCELLED * unrelated:
            self._channel = int(self._powers.argmax())
            log.warning(
                "%s: the channels cancel each other; channel %d of %d is used alone",
                self._source,
                self._channel + 1,
                wide.shape[1],
            )


def _is_pcm_type(dtype: np.dtype[np.generic]) -> bool:
    return dtype.kind == "f" or (dtype.kind == "i" and dtype.itemsize == 2)


def _power(wide: Array) -> NDArray[np.float64]:
    """The summed squares of each channel of (N, channels), without its constant."""
    return np.asarray(wide.var(axis=0, dtype=np.float64) * len(wide))
