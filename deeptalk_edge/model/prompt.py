"""The prompt template, segment by segment, as grid rows.

    <BOS>{system}\\n\\nUser: {user}\\n\\nAssistant: {answer}<EOS>\\n\\nUser: {user} ...

Every segment (system to `Assistant: `, an answer, a later user turn) was tokenized on its own in
training, and the tokenizer set BOS before each: a conversation begins with two BOS, and BOS is the
first id of every answer. The model was trained so; a loader that "repairs" it breaks parity.

Source: DeepTalk `src/utils/conversation.py: conv_deepseek`, `data_util.py: tokenize_conversation`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.rows import Ids, audio_rows, codec_columns, text_rows
from deeptalk_edge.model.spec import VocabularySpec

AUDIO_TOKEN = "<|audio|>"

_BEFORE_USER = "\n\nUser: "
_BEFORE_ANSWER = "\n\nAssistant: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A user turn that was spoken."""

    num_frames: int
    """Encoder frames of the utterance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Typed:
    """A user turn that was written."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of the prompt: rows (T, K + 1), and the mask (T,) of those that take audio."""

    rows: Ids
    audio_mask: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """Writes prompts for one vocabulary; `encode` gives text ids without any special id."""

    vocabulary: VocabularySpec
    audio_id: int
    """The id of `<|audio|>`, from the tokenizer."""
    encode: Callable[[str], list[int]]

    def opening(self, system: str, user: Heard | Typed) -> Segment:
        """The first segment: system text and user turn."""
        bos = self.vocabulary.bos
        return self._segment([bos, bos], system + _BEFORE_USER, user)

    def next_turn(self, user: Heard | Typed) -> Segment:
        """A later user turn, after an answer that ended in EOS."""
        return self._segment([self.vocabulary.bos], _BEFORE_USER, user)

    def answer(self, text: str) -> list[int]:
        """Text ids of a whole answer, BOS and EOS included."""
        return [self.vocabulary.bos, *self.encode(text), self.vocabulary.eos]

    def _segment(self, first: list[int], before: str, user: Heard | Typed) -> Segment:
        if isinstance(user, Typed):
            text = before + user.text + _BEFORE_ANSWER  # one string, as merges may cross the joins
            rows = text_rows(self.vocabulary, first + self.encode(text))
            return Segment(rows=rows, audio_mask=np.zeros(len(rows), np.bool_))
        heard, mask = audio_rows(self.vocabulary, self.audio_id, user.num_frames)
        left = text_rows(self.vocabulary, first + self.encode(before))
        right = text_rows(self.vocabulary, self.encode(_BEFORE_ANSWER))
        return Segment(
            rows=np.concatenate([left, heard, right]),
            audio_mask=np.pad(mask, (len(left), len(right))),
        )


def folded(text: str) -> str:
    """Lower case, words one space apart, no punctuation but apostrophes within words."""
    text = (
        unicodedata.normalize("NFKC", text).lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    )
    is_kept = (c == "'" or not unicodedata.category(c).startswith("P") for c in text)
    words = "".join(c if kept else " " for c, kept in zip(text, is_kept, strict=True)).split()
    return " ".join(word for each in words if (word := each.strip("'")))


def speak_as(vocabulary: VocabularySpec, rows: Ids, speaker: str) -> Ids:
    """The prompt rows (T, K + 1) with the speaker token in the codec columns of the last row, which
    requests a spoken answer.

    Raises ArtifactError if the checkpoint knows no such speaker.
    """
    spoken = rows.copy()
    spoken[-1, :-1] = codec_columns(vocabulary, vocabulary.speaker(speaker))
    return spoken
