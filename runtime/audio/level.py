"""Sound levels, and recordings that are too quiet to be understood."""

from __future__ import annotations

import logging
import math

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.features import RATE_HZ

Array = NDArray[np.float32]

QUIET_DBFS = -100.0  # level of digital silence

HEARD_DBFS = -38.0
"""The quietest speech that the model was trained on, within a few dB: the shipped checkpoint gets
24 of 24 questions right at -30 dBFS, 22 at -40, 18 at -50 and 1 at -60."""

_RAISED_DBFS = -20.0  # level that too quiet speech is amplified to
_LEAST_DBFS = -70.0  # lowest level at which 16 bits still resolve speech
_SPEECH_RANGE_DB = 10.0  # least range from soft to loud frames; steady noise has 2
_FRAME_SAMPLES = RATE_HZ // 50
_LOUD_FRAMES = 10  # 200 ms: longer than a click, shorter than a word

log = logging.getLogger(__name__)


def level_dbfs(pcm: Array) -> float:
    """Mean level of (N,) relative to a full-scale square wave, at least `QUIET_DBFS`."""
    power = float(np.dot(pcm, pcm)) / max(len(pcm), 1)
    return max(10 * math.log10(power), QUIET_DBFS) if power else QUIET_DBFS


def peak_dbfs(pcm: Array) -> float:
    """Level of the largest sample of (N,), at least `QUIET_DBFS`."""
    peak = float(np.abs(pcm).max(initial=0.0))
    return max(20 * math.log10(peak), QUIET_DBFS) if peak else QUIET_DBFS


def loud_dbfs(pcm: Array) -> float:
    """Level of the loudest 200 ms of 16 kHz PCM (N,), not necessarily contiguous: the level of the
    speech in it, whatever the pauses."""
    levels = _frame_levels(pcm)
    return float(levels[-min(_LOUD_FRAMES, len(levels))])


def warn_if_quiet(utterance: Array) -> None:
    """Log a warning if a whole utterance, 16 kHz (N,), is too quiet for the model. Do not call it
    on the beginning of an utterance, which has no loud 200 ms yet."""
    if (level := loud_dbfs(utterance)) < HEARD_DBFS:
        log.warning(
            "the speech is at %.0f dBFS: below %.0f the model hears wrongly; amplify it, or move "
            "closer to the microphone",
            level,
            HEARD_DBFS,
        )


def raise_quiet(pcm: Array, source: str) -> Array:
    """Return a 16 kHz recording (N,), amplified with a warning if its speech is too quiet.

    A recording whose level varies less than speech does is background noise and is not amplified.
    """
    levels = _frame_levels(pcm)
    loud, sounding = loud_dbfs(pcm), levels[levels > QUIET_DBFS]
    if not _LEAST_DBFS <= loud < HEARD_DBFS:
        return pcm
    if loud - float(np.percentile(sounding, 10)) < _SPEECH_RANGE_DB:
        return pcm
    gain_db = _RAISED_DBFS - loud
    log.warning(
        "%s: the speech is at %.0f dBFS, too quiet; amplified by %.0f dB", source, loud, gain_db
    )
    raised: Array = np.clip(pcm * np.float32(10 ** (gain_db / 20)), -1, 1)
    return raised


def _frame_levels(pcm: Array) -> NDArray[np.float64]:
    """Return the level of every 20 ms, at least one value, in ascending order."""
    num_frames = max(-(-len(pcm) // _FRAME_SAMPLES), 1)
    padded = np.pad(pcm, (0, num_frames * _FRAME_SAMPLES - len(pcm)))
    frames = padded.reshape(-1, _FRAME_SAMPLES)
    powers = np.einsum("nt,nt->n", frames, frames, dtype=np.float64) / _FRAME_SAMPLES
    floor = 10 ** (QUIET_DBFS / 10)
    return np.sort(10 * np.log10(np.maximum(powers, floor)))
