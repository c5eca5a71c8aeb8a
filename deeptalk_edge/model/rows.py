"""Grid rows: eight ids per position, seven of speech and one of text, and the delay between them.

A row is (K + 1,): K codec ids in the order [c12 | 2 x c24 | 4 x c48], then the text id, all of them
ids of the one shared vocabulary. In an answer, codebook i lags the text by i + 1 rows:

    row    0    1    2   ...  7    8
    text   t0   t1   t2  ...  t7   t8
    cb 0   .    f0   f1  ...  f6   f7
    cb 6   .    .    .   ...  f0   f1      frame f is complete at row f + K

Codes on their own, un-delayed, are frames: (A, K), un-shifted.

Source: DeepTalk `data_util.py: extract_input_output`, `eval_qa.py: batch_parallel_decode`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.spec import VocabularySpec

Ids = NDArray[np.int64]


def text_rows(vocabulary: VocabularySpec, text_ids: list[int] | Ids) -> Ids:
    """Rows (T, K + 1) of a text without speech: every codebook holds PAD_A."""
    rows = np.empty((len(text_ids), vocabulary.num_codebooks + 1), np.int64)
    rows[:, :-1] = codec_columns(vocabulary, vocabulary.pad_audio)
    rows[:, -1] = text_ids
    return rows


def audio_rows(
    vocabulary: VocabularySpec, audio_id: int, num_frames: int
) -> tuple[Ids, NDArray[np.bool_]]:
    """Rows (n + 2, K + 1) of a heard utterance of n encoder frames, and the mask (n + 2,) of the n
    rows whose codec columns the projected audio features replace."""
    rows = text_rows(vocabulary, [audio_id] * (num_frames + 2))
    rows[0, :-1] = codec_columns(vocabulary, vocabulary.begin_audio)
    rows[-1, :-1] = codec_columns(vocabulary, vocabulary.end_audio)
    mask = np.ones(num_frames + 2, np.bool_)
    mask[[0, -1]] = False
    return rows, mask


def codec_columns(vocabulary: VocabularySpec, local_id: int) -> Ids:
    """The same un-shifted id in every codebook's block: (K,)."""
    bases = [vocabulary.codebook_base(i) for i in range(vocabulary.num_codebooks)]
    return np.array(bases, np.int64) + local_id


def delay(vocabulary: VocabularySpec, frames: Ids, text_ids: list[int]) -> Ids:
    """Lay an answer out: frames (A, K) and its text, EOS included, give rows (L, K + 1).

    L = A + 1 + K, one row for EOA. EOT follows the text, then PAD_T; EOA ends every codebook. A
    text longer than the speech lengthens the grid, and the codebooks pad.
    """
    num_frames, k = frames.shape
    length = max(num_frames + 1 + k, len(text_ids) + 1)
    rows = text_rows(vocabulary, [vocabulary.pad_text] * length)
    rows[: len(text_ids) + 1, -1] = [*text_ids, vocabulary.eot]
    for i in range(k):
        start, base = i + 1, vocabulary.codebook_base(i)
        rows[start : start + num_frames, i] = base + frames[:, i]
        rows[start + num_frames, i] = base + vocabulary.end_audio
    return rows


class AnswerRows:
    """Turns sampled ids into the rows to feed next, and rows into codec frames. One per answer.

    It holds the rules that are not learnt: which codebooks have begun, which have ended, and what
    the text column shows once the text is over.
    """

    def __init__(self, vocabulary: VocabularySpec, *, speech: bool = True) -> None:
        self._vocabulary = vocabulary
        self._bases = codec_columns(vocabulary, 0)
        self._codes: list[Ids] = []  # un-shifted (K,), one for every row so far
        # The row in which codebook 0 said EOA; an answer without speech ended before it began.
        self._end_row: int | None = None if speech else -vocabulary.num_codebooks
        self._forced_text: int | None = None
        self.num_clamped = 0
        """Special ids inside a frame, read as code 0, as the released decoder does."""

    @property
    def num_rows(self) -> int:
        return len(self._codes)

    @property
    def is_text_done(self) -> bool:
        """EOS has been said; what follows in the text column is EOT, then PAD_T."""
        return self._forced_text is not None

    @property
    def is_speech_done(self) -> bool:
        """Every codebook has ended: codebook i ends i rows after codebook 0."""
        return self._end_row is not None and self.num_rows >= self._end_row + len(self._bases)

    @property
    def is_done(self) -> bool:
        return self.is_text_done and self.is_speech_done

    def push(self, text_id: int, code_ids: Ids) -> tuple[Ids, Ids | None]:
        """Take what was sampled for the next row: a text id and un-shifted codes (K,).

        Returns the row (K + 1,) as it is to be fed, the grid's fixed ids in their places, and the
        codec frame (K,) that this row completes, if any.
        """
        row = self.num_rows
        if self._end_row is None and row > 0 and code_ids[0] == self._vocabulary.end_audio:
            self._end_row = row
        codebook = np.arange(len(self._bases))
        silent = codebook >= row
        if self._end_row is not None:
            silent |= codebook < row - self._end_row
        codes = np.where(silent, self._vocabulary.pad_audio, code_ids)
        self._codes.append(codes)
        return np.append(codes + self._bases, self._push_text(text_id)), self._frame(row)

    def _push_text(self, text_id: int) -> int:
        if self._forced_text is not None:
            text_id, self._forced_text = self._forced_text, self._vocabulary.pad_text
        elif text_id == self._vocabulary.eos:
            self._forced_text = self._vocabulary.eot
        return text_id

    def _frame(self, row: int) -> Ids | None:
        first = row - len(self._bases)
        if first < 0 or (self._end_row is not None and first + 1 >= self._end_row):
            return None
        frame = np.array([self._codes[first + i + 1][i] for i in range(len(self._bases))], np.int64)
        special = frame >= self._vocabulary.codebook_size
        self.num_clamped += int(special.sum())
        return np.where(special, 0, frame)
