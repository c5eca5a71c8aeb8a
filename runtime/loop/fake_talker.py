"""A talker without a model: known words at a known pace, for tests, simulations and integrators
without weights.

Turn n answers "n.0 n.1 n.2 ...", and its sound is a constant made from n, so that every sample
shows its turn. A word takes four codec frames.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.events import AudioChunk, Metrics, Pieces, TextPiece

Array = NDArray[np.float32]

FRAME_SAMPLES = 2048
WORD_FRAMES = 4
_NUM_LEVELS = 500
_DELAY_ROWS = 9  # rows until the first sound is final
_ENCODE_MS, _PREFILL_MS, _ROW_MS = 30.0, 20.0, 8.0


def level_of(turn: int) -> float:
    """The constant of turn n's sound; turns 500 apart share one."""
    return (1 + turn % _NUM_LEVELS) / 1024


class FakeTalker:
    """Answers every question and records how much of each answer was heard."""

    rate_hz = 24000
    max_question_samples = 30 * RATE_HZ
    knows_whole = False

    def __init__(self, num_frames: Callable[[int], int] = lambda turn: 24) -> None:
        """`num_frames` is the length of the answer of turn n, in codec frames."""
        self._num_frames = num_frames
        self.history: list[str] = []
        """The kept text of each answer."""
        self.num_turns = 0
        self.num_discarded = 0
        self.num_steps = 0
        self.made_samples = 0
        """Rows of all answers, discarded ones included."""
        self._last_ms = 0.0

    def step_ms(self) -> float:
        """Time of the last step on an imagined small device."""
        return self._last_ms

    def begin(self, question: Array | str) -> FakeAnswer:
        return FakeAnswer(self, self.num_turns, self._num_frames(self.num_turns))

    def user_started_speaking(self) -> None:
        pass

    def idle(self) -> int:
        return self.trim_history()

    def trim_history(self) -> int:
        del self.history[:-100]
        return 0

    def reset(self) -> None:
        self.history.clear()

    def spend(self, ms: float) -> None:
        """Count a step."""
        self.num_steps += 1
        self._last_ms = ms


class FakeAnswer:
    """One answer of a `FakeTalker`."""

    stage = "row"
    text_log_p: float | None = None
    is_whole: bool | None = None

    def __init__(self, talker: FakeTalker, turn: int, num_frames: int) -> None:
        self._talker, self._turn, self._num_frames = talker, turn, num_frames
        self._made_frames = 0
        self._compute_ms = 0.0
        self._is_over = False
        self._steps = self._write()

    def advance(self) -> Pieces | None:
        return next(self._steps, None)

    def finish(self, heard_samples: int | None = None) -> str:
        assert not self._is_over
        self._is_over = True
        num_frames = self._made_frames
        if heard_samples is not None:
            assert 0 <= heard_samples <= num_frames * FRAME_SAMPLES
            num_frames = heard_samples // FRAME_SAMPLES
        text = " ".join(f"{self._turn}.{word}" for word in range(num_frames // WORD_FRAMES))
        self._talker.history.append(text)
        self._talker.num_turns += 1
        return text

    def discard(self) -> None:
        assert not self._is_over
        self._is_over = True
        self._talker.num_discarded += 1

    def metrics(self) -> Metrics:
        return Metrics(
            num_prompt_rows=100,
            num_rows=self._made_frames + _DELAY_ROWS,
            encoder_ms=_ENCODE_MS,
            prefill_ms=_PREFILL_MS,
            first_frame_ms=_ENCODE_MS + _PREFILL_MS + _DELAY_ROWS * _ROW_MS,
            first_sample_ms=_ENCODE_MS + _PREFILL_MS + _DELAY_ROWS * _ROW_MS,
            step_ms_p50=_ROW_MS,
            step_ms_p95=_ROW_MS,
            compute_s=self._compute_ms / 1000,
            audio_s=self._made_frames * FRAME_SAMPLES / self._talker.rate_hz,
            understood_p=None,
            right_p=None,
            text_log_p=self.text_log_p,
            gpu_ms=None,
            stopped="end",
            num_clamped=0,
        )

    def _spend(self, ms: float) -> None:
        self._talker.spend(ms)
        self._compute_ms += ms

    def _write(self) -> Generator[Pieces, None, None]:
        for ms in (_ENCODE_MS, _PREFILL_MS, *[_ROW_MS] * _DELAY_ROWS):
            self._spend(ms)
            yield ()
        sound = np.full(FRAME_SAMPLES, level_of(self._turn), np.float32)
        for frame in range(self._num_frames):
            self._spend(_ROW_MS)
            self._talker.made_samples += FRAME_SAMPLES
            self._made_frames += 1
            if frame % WORD_FRAMES:
                yield (AudioChunk(sound),)
            else:
                yield (TextPiece(f"{self._turn}.{frame // WORD_FRAMES} "), AudioChunk(sound))
