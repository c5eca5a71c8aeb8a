"""The questions of `run`: the utterances of every recording, then the typed ones. Each is a
turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.end_of_turn import EndOfTurn
from deeptalk_edge.runtime.loop.utterances import read_utterances

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Question:
    """One turn's question."""

    content: Array | str
    """16 kHz PCM (N,), or text."""
    source: str
    """The file's name as given, or the text."""
    shown: str
    """Label in the transcript."""
    utterance: int | None = None
    """Number of the utterance in its file, from 1; None if it was typed."""

    @property
    def speech_s(self) -> float | None:
        """Length of the utterance; None if it was typed."""
        return None if isinstance(self.content, str) else len(self.content) / RATE_HZ


def open_questions(
    wavs: Sequence[Path], texts: Sequence[str], max_samples: int, end_of_turn: EndOfTurn
) -> list[Question]:
    """Read all questions. Raises AudioError if a recording cannot be used or holds no speech."""
    spoken = [question for path in wavs for question in _spoken(path, max_samples, end_of_turn)]
    return [*spoken, *(Question(text, text, text) for text in texts)]


def _spoken(path: Path, max_samples: int, end_of_turn: EndOfTurn) -> Iterator[Question]:
    utterances = read_utterances(path, max_samples, end_of_turn=end_of_turn)
    for number, pcm in enumerate(utterances, 1):
        which = f", {number} of {len(utterances)}" if len(utterances) > 1 else ""
        shown = f"{path.name}{which} ({len(pcm) / RATE_HZ:.1f} s of speech)"
        yield Question(pcm, str(path), shown, number)
