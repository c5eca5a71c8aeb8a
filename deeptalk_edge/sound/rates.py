"""Sample rates of a stream: blocks in, blocks out, at once and without a seam.

law   a stream comes out `late_s` late, always and exactly; a block of 20 ms gives 20 ms, at every
      rate that is a multiple of 50 Hz. Libraries resample in larger pieces: soxr gives 0, 1660, 0,
      1660 samples for blocks of 960, and an echo canceller takes every such step for another room
how   a windowed sinc at the rates' common multiple; of its taps, each output meets those that fall
      on input samples. A step of M inputs gives L outputs, as one product with a matrix
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

_LATE_S = 0.002
_STOPBAND_DB = 70.0


class StreamResampler:
    """One stream from a rate to another, in blocks of any size. Not thread-safe."""

    def __init__(self, from_hz: int, to_hz: int) -> None:
        common = math.gcd(from_hz, to_hz)
        self._from_hz = from_hz
        self._step_in, self._step_out = from_hz // common, to_hz // common
        self.late_s = 0.0 if from_hz == to_hz else _LATE_S
        """How late a sound comes out."""
        self._matrix = _polyphase(self._step_in, self._step_out, from_hz)
        self._num_past = len(self._matrix) - self._step_in
        # What the next outputs still need, then what has not made a whole step.
        self._before = np.zeros(self._num_past, np.float32)

    @property
    def waiting_s(self) -> float:
        """Of what was pushed: what waits for a whole step. Nothing between blocks of 20 ms at rates
        that are multiples of 50 Hz."""
        return (len(self._before) - self._num_past) / self._from_hz

    def push(self, pcm: Array) -> Array:
        """Take (N,); returns what is whole at the other rate."""
        if not self.late_s:
            return pcm
        pcm = np.concatenate([self._before, pcm])
        span = len(self._matrix)
        num_steps = max(len(pcm) - span + self._step_in, 0) // self._step_in
        self._before = pcm[num_steps * self._step_in :]
        if not num_steps:
            return np.empty(0, np.float32)
        steps = np.lib.stride_tricks.sliding_window_view(pcm, span)[:: self._step_in][:num_steps]
        out: Array = np.ascontiguousarray(steps) @ self._matrix
        return out.reshape(-1)


def _polyphase(step_in: int, step_out: int, from_hz: int) -> Array:
    """Which share each input of a step and before it has in each output: (inputs, `step_out`)."""
    fine_hz = from_hz * step_out
    half = round(_LATE_S * fine_hz)
    sinc = _low_pass(half, min(from_hz, fine_hz // step_in) / fine_hz)
    past = -(-2 * half // step_out)  # inputs before a step that its outputs meet
    inputs = np.arange(-past, step_in)[:, None]
    taps = np.arange(step_out)[None] * step_in - inputs * step_out
    is_inside = (taps >= 0) & (taps <= 2 * half)
    matrix = np.where(is_inside, sinc[taps.clip(0, 2 * half)], 0.0)
    return np.asarray(step_out * matrix, np.float32)


def _low_pass(half: int, rate: float) -> NDArray[np.float64]:
    """A Kaiser-windowed sinc of 2 half + 1 taps that passes what `rate`, a fraction of the taps'
    own, can hold. Source: Oppenheim and Schafer, Discrete-Time Signal Processing, 7.6."""
    width = (_STOPBAND_DB - 7.95) / (14.36 * 2 * half)  # from pass to stop, of the taps' rate
    cutoff = rate - width
    place = np.arange(-half, half + 1)
    taps = np.sinc(cutoff * place) * np.kaiser(2 * half + 1, 0.1102 * (_STOPBAND_DB - 8.7))
    return np.asarray(taps / taps.sum())
