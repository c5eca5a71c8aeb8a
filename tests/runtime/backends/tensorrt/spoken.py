"""Spoken questions to a bundle, and all choices of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.runtime import decoding
from deeptalk_edge.runtime.conversation import AudioChunk, Conversation, ConversationSettings
from deeptalk_edge.runtime.lm.sampler import Sampler
from deeptalk_edge.sound.wav import read_wav
from tests.places import QUESTIONS_FOLDER

QUESTIONS = sorted(QUESTIONS_FOLDER.glob("*.wav"))


@dataclass
class Spoken:
    """The answers of a conversation, and the logits that they were chosen by."""

    tokens: list[tuple[int, ...]] = field(default_factory=list)
    """Text id and codec ids of every step."""
    logits: list[NDArray[np.float32]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """The text of each answer in the history."""
    sound: list[NDArray[np.float32]] = field(default_factory=list)


def ask(bundle: Bundle, questions: Sequence[Path], *, interrupt: bool, **changes: Any) -> Spoken:
    """Ask all questions in one conversation. With `interrupt`, every second answer is interrupted
    after three pieces of sound, half of which were heard."""
    said = Spoken()
    settings = replace(ConversationSettings.of(bundle), **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "Sampler", _spy(said))
        with Conversation(bundle, settings) as conversation:
            for number, path in enumerate(questions):
                _ask_one(conversation, path, said, cuts=interrupt and number % 2 == 1)
    return said


def _ask_one(conversation: Conversation, path: Path, said: Spoken, *, cuts: bool) -> None:
    conversation.user_started_speaking()
    answer, pcm = conversation.begin(read_wav(path).pcm), []
    while (pieces := answer.advance()) is not None:
        pcm += [piece.pcm for piece in pieces if isinstance(piece, AudioChunk)]
        if cuts and len(pcm) == 3:
            break
    num_samples = sum(map(len, pcm))
    said.texts.append(answer.finish(num_samples // 2 if cuts else None))
    said.sound.append(np.concatenate([np.empty(0, np.float32), *pcm]))
    conversation.idle()


def _spy(said: Spoken) -> Any:
    class SpyingSampler(Sampler):
        def sample(self, text: Any, codes: Any) -> Any:
            chosen = super().sample(text, codes)
            said.logits += [array.copy() for array in (text, codes) if array is not None]
            said.tokens.append((int(chosen[0]), *map(int, chosen[1])))
            return chosen

    return SpyingSampler


def largest_error(found: Spoken, expected: Spoken) -> float:
    """Largest error of all logits, relative to the largest logit of each step."""
    assert len(found.logits) == len(expected.logits)
    pairs = zip(found.logits, expected.logits, strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
