"""What a bundle makes of recordings: their features, and the entropy of the answers begun."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.understanding.recordings import Recording
from deeptalk_edge.errors import EdgeError
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.settings import ConversationSettings
from deeptalk_edge.runtime.understanding import ANSWER_ALL

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Measured:
    """One recording, as the model has it."""

    recording: Recording
    features: Array
    """(n, C)."""
    mean_entropy: float
    """Of the answer's first rows, in nats."""
    said: str
    """The answer; "" if only its first rows were written."""

    @property
    def is_right(self) -> bool:
        """Whether it is the answer that the recording wants; true where none is known."""
        wanted = self.recording.answer
        return not wanted or self.said.strip() == wanted


def measure(bundle: Bundle, recordings: Sequence[Recording], threads: int) -> Iterator[Measured]:
    """Ask every recording by itself, in text; whole answers where the right one is known.

    Recordings that the model cannot be asked, longer than its window say, are left out. Raises
    ArtifactError or BackendError if the bundle cannot be run.
    """
    settings = ConversationSettings.of(bundle, mode="text", threads=threads)
    object.__setattr__(settings, "understanding", ANSWER_ALL)
    with Conversation(bundle, settings) as talk:
        for recording in recordings:
            talk.reset()
            try:
                answer = talk.begin(recording.pcm)
                while answer.advance() is not None:
                    if answer.text_entropy is not None and not recording.answer:
                        break
                assert answer.features is not None
                assert answer.text_entropy is not None
                yield Measured(recording, answer.features, answer.text_entropy, answer.text)
            except EdgeError:
                continue
            finally:
                talk.reset()
