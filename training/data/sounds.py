"""Recordings of a data set, as the encoder takes them: 16 kHz mono, cut to their clips."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import soxr
from numpy.typing import NDArray

from deeptalk_edge.errors import AudioError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.sound.sound_file import read_sound
from deeptalk_edge.training.data.conversations import BadSample, Clip

Samples = NDArray[np.float32]


@lru_cache(maxsize=1 << 16)
def sound_length(path: Path) -> tuple[int, int]:
    """Samples and rate of a recording; of a WAV file only the header is read.

    Raises BadSample if it is missing or no sound.
    """
    try:
        with wave.open(str(path)) as file:
            return file.getnframes(), file.getframerate()
    except FileNotFoundError:
        raise BadSample(f"{path}: no such recording") from None
    except (wave.Error, EOFError, OSError):
        pass  # another kind of sound, or an unusual WAV file
    try:
        sound = read_sound(path)
    except AudioError as error:
        raise BadSample(str(error)) from error
    return len(sound.pcm), sound.rate_hz


def clip_seconds(clip: Clip) -> float:
    """Seconds of a clip. Raises BadSample if there is nothing of it."""
    count, rate_hz = sound_length(clip.path)
    end = count if clip.end is None else clip.end
    if not 0 <= clip.start < end <= count:
        raise BadSample(f"{clip.path}: samples {clip.start} to {end} of {count}")
    return (end - clip.start) / rate_hz


def read_clips(clips: Sequence[Clip]) -> Samples:
    """All clips end to end, at 16 kHz. Raises AudioError if one cannot be read."""
    pieces = []
    for clip in clips:
        sound = read_sound(clip.path)
        pcm = sound.pcm[clip.start : clip.end]
        if sound.rate_hz != RATE_HZ:
            pcm = soxr.resample(pcm, sound.rate_hz, RATE_HZ)
        pieces.append(np.asarray(pcm, np.float32))
    joined = np.concatenate(pieces)
    if not np.isfinite(joined).all():
        raise AudioError("the recording holds NaN or infinite samples")
    return joined
