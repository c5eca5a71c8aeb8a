"""Pitch as a cue for the end of a sentence: speakers lower it at the end and keep it up before
more.

The cue is one figure: how far the last voiced sound lies below the utterance's median pitch. It is
weak; where it is unsure, the hangover stays as long as without it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.features import RATE_HZ

Array = NDArray[np.float32]

_HOP, _WINDOW = RATE_HZ // 100, RATE_HZ // 25
_LOWEST_HZ, _HIGHEST_HZ = 70, 400
_LONGEST_S = 6
_OCTAVE_COST = 0.03
_TAIL_FRAMES = 12  # voiced, of 10 ms: the last syllable
_LEAST_FRAMES = 30  # voiced; fewer do not give the speaker's median
# p is one half at `_HALF_SEMITONES`; its odds change e-fold per `_SPREAD_SEMITONES`. So p passes
# 0.6 at -4, which one unfinished sentence in ten reaches, too: `make bench NAME=end_of_turn`.
_HALF_SEMITONES, _SPREAD_SEMITONES = -3.4, 1.5


class FinalLowering:
    """The `TurnCue` that needs no extra package; it takes 5 ms for two seconds of speech."""

    def p_complete(self, utterance: Array) -> float:
        lowering = final_pitch(utterance)
        if lowering is None:
            return 0.5
        return 1 / (1 + math.exp((lowering - _HALF_SEMITONES) / _SPREAD_SEMITONES))


def final_pitch(utterance: Array) -> float | None:
    """Pitch of the last voiced 120 ms relative to the median, in semitones, at most 12 off.

    Returns None if there is not enough voiced sound.
    """
    pcm = utterance[-_LONGEST_S * RATE_HZ :]
    if len(pcm) < _WINDOW:
        return None
    hz = pitch_hz(pcm)
    hz = hz[~np.isnan(hz)]
    if len(hz) < _LEAST_FRAMES:
        return None
    semitones = 12 * np.log2(np.median(hz[-_TAIL_FRAMES:]) / np.median(hz))
    return float(np.clip(semitones, -12, 12))


def pitch_hz(pcm: Array) -> NDArray[np.float64]:
    """Pitch every 10 ms of (N,), NaN where the sound is unvoiced or quiet.

    The highest peak of the autocorrelation divided by the window's own. Source: Boersma 1993.
    """
    frames = np.lib.stride_tricks.sliding_window_view(pcm, _WINDOW)[::_HOP]
    power = np.mean(frames**2, axis=1)
    is_loud = power > max(float(power.max()) * 10**-3.5, 10**-5.5)
    window = np.hanning(_WINDOW)
    shortest, longest = RATE_HZ // _HIGHEST_HZ, RATE_HZ // _LOWEST_HZ
    likeness = _autocorrelation(frames * window)[:, : longest + 1]
    likeness = likeness / _autocorrelation(window[None])[:, : longest + 1]
    periodic = likeness[:, shortest:] / (likeness[:, :1] + 1e-9)
    # One period and two have peaks of equal height: the cost makes the shorter lag win.
    periodic -= _OCTAVE_COST * np.log2(np.arange(shortest, longest + 1) / shortest)
    lag = periodic.argmax(axis=1)
    is_voiced = is_loud & (periodic.max(axis=1) > 0.55)
    return np.where(is_voiced, RATE_HZ / (lag + shortest), np.nan)


def _autocorrelation(frames: NDArray[np.float64]) -> NDArray[np.float64]:
    """Autocorrelation of each row, for lags up to its length."""
    num_points = 2 * _WINDOW
    return np.fft.irfft(np.abs(np.fft.rfft(frames, num_points)) ** 2)[:, :_WINDOW]
