"""What understanding is fitted on: recordings with their words, and recordings of anything else.

NAME.wav     one spoken question
NAME.txt     beside it: what is asked; in a second line the right answer, if it is known
parts        a folder `parts` holds beginnings of questions, broken off; they need no text
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.model.prompt import folded
from deeptalk_edge.sound.sound_file import read_sound
from deeptalk_edge.sound.wav import resample

Array = NDArray[np.float32]

_SOUNDS = {".wav", ".flac", ".ogg", ".mp3"}
_STEP = RATE_HZ // 100
_AROUND = 12  # steps of 10 ms to both sides in which the quietest is looked for
_QUIET = 0.02  # of the peak: level of what is no speech
_SPOKEN = 0.1  # of the peak: above any noise that `framed` adds
_LEAST_BROKEN = 40 * _STEP
_SILENT_SHARE = 0.35


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One utterance, cut as the voice loop cuts it."""

    name: str
    pcm: Array
    """(N,), 16 kHz."""
    text: str = ""
    """In lower case without punctuation."""
    answer: str = ""


def read_questions(folders: Iterable[Path]) -> list[Recording]:
    """Every recording that has its words beside it.

    Raises SettingsError if there is none, AudioError if one cannot be read.
    """
    found = []
    for path in _sounds(folders):
        words = path.with_suffix(".txt")
        if not words.is_file():
            continue
        lines = words.read_text(encoding="utf-8").splitlines() or [""]
        answer = lines[1].strip() if len(lines) > 1 else ""
        found.append(
            Recording(name=str(path), pcm=_read(path), text=folded(lines[0]), answer=answer)
        )
    if not found:
        raise SettingsError("no recording has its words beside it; write NAME.txt for NAME.wav")
    return found


def read_others(folders: Iterable[Path]) -> list[Recording]:
    """Every recording, without words.

    Raises AudioError if one cannot be read.
    """
    return [Recording(name=str(path), pcm=_read(path)) for path in _sounds(folders)]


def framed(pcm: Array) -> Array:
    """As the voice loop might cut it out: 100 to 500 ms before the first sound and after the last,
    digital silence around it or noise of -100 to -55 dB. Drawn from its length, so the same each
    time."""
    values = np.random.default_rng(len(pcm))
    heard = np.pad(trimmed(pcm), values.integers(RATE_HZ // 10, RATE_HZ // 2, 2))
    if values.random() < _SILENT_SHARE:
        return heard
    level = np.float32(10 ** values.uniform(-5, -2.75))
    return heard + values.standard_normal(len(heard), np.float32) * level


def trimmed(pcm: Array, level: float = _QUIET) -> Array:
    """From its first sound above this share of the peak to its last."""
    loud = np.flatnonzero(np.abs(pcm) > level * np.abs(pcm).max())
    return pcm[loud[0] : loud[-1] + 1] if loud.size else pcm


def broken_off(pcm: Array, rng: random.Random) -> Array | None:
    """The first 30 to 85 % of the speech, up to the quietest 10 ms within 120 ms; None of less than
    400 ms. The silence around speech does not count: 85 % of both are often the whole question."""
    pcm = trimmed(pcm, _SPOKEN)
    if len(pcm) < _LEAST_BROKEN:
        return None
    place = int(rng.uniform(0.3, 0.85) * len(pcm)) // _STEP
    power = (pcm[: len(pcm) // _STEP * _STEP].reshape(-1, _STEP) ** 2).mean(axis=1)
    first = max(place - _AROUND, 10)
    return pcm[: (first + int(power[first : place + _AROUND].argmin())) * _STEP]


def _sounds(folders: Iterable[Path]) -> list[Path]:
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise SettingsError(f"{folder}: no such folder")
        found += sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SOUNDS)
    return found


def _read(path: Path) -> Array:
    return framed(resample(read_sound(path), RATE_HZ).pcm)
