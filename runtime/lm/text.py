"""The text tokenizer, and text pieces while an answer is written.

A piece is returned when it can no longer change. A token may hold half a character, and its text
may depend on the token before it (usually a space), so pieces are differences of decoded windows.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.prompt import AUDIO_TOKEN, Template
from deeptalk_edge.model.spec import VocabularySpec

_HALF_CHARACTER = "\ufffd"


class TextTokenizer:
    """Converts text to ids and back, without the ids that structure the grid."""

    def __init__(self, path: Path, vocabulary: VocabularySpec) -> None:
        """Load `tokenizer.json`.

        Raises ArtifactError if it is not a tokenizer or lacks `<|audio|>`.
        """
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the binding raises Exception itself
            raise ArtifactError(f"{path}: not a tokenizer ({error}); export again") from error
        audio_id = self._tokenizer.token_to_id(AUDIO_TOKEN)
        if audio_id is None:
            raise ArtifactError(f"{path}: the token {AUDIO_TOKEN} is missing; export again")
        # Special tokens in a user's text are plain text: "<|audio|>" is nine characters.
        self._tokenizer.encode_special_tokens = True
        self._silent = {vocabulary.bos, vocabulary.eos, *vocabulary.text_specials.values()}
        self.template = Template(vocabulary=vocabulary, audio_id=audio_id, encode=self.encode)

    def encode(self, text: str) -> list[int]:
        # The tokenizer refuses lone surrogates: half of an emoji, or an argument that was not
        # UTF-8.
        text = text.encode(errors="replace").decode()
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, without ids that structure the grid."""
        text: str = self._tokenizer.decode(
            [i for i in ids if not self.is_silent(i)], skip_special_tokens=True
        )
        return text

    def is_silent(self, text_id: int) -> bool:
        """Whether an id structures the grid and has no text."""
        return text_id in self._silent

    def stream(self) -> TextStream:
        return TextStream(self)


class TextStream:
    """The text of one answer, id by id."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # the last returned ids, for context, then ids held back
        self._num_given = 0
        self.text = ""
        """All text returned so far."""

    def push(self, text_id: int) -> str:
        """Take an id; returns the text that has become certain, often empty."""
        if self._tokenizer.is_silent(text_id):
            return ""
        self._window.append(text_id)
        if self._tokenizer.decode(self._window).endswith(_HALF_CHARACTER):
            return ""
        return self._give()

    def finish(self) -> str:
        """The answer is over: returns the remaining text; half a character is dropped."""
        return self._give() if len(self._window) > self._num_given else ""

    def reading(self, ids: list[int]) -> str:
        """Return the text of the answer's first ids; half a character is dropped."""
        return self._tokenizer.decode(ids).rstrip(_HALF_CHARACTER).strip()

    def _give(self) -> str:
        before = self._tokenizer.decode(self._window[: self._num_given])
        piece = self._tokenizer.decode(self._window)[len(before) :].rstrip(_HALF_CHARACTER)
        self._window = self._window[self._num_given :]
        self._num_given = len(self._window)
        if not self.text:
            piece = piece.lstrip()
        self.text += piece
        return piece
