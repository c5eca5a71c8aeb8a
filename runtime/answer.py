"""An answer on its way: advanced in small steps, then finished into the history or discarded.

step      one graph run or one row at a time, so whoever holds an answer can let go between two
refused   a spoken line takes the answer's place; to finish it is to discard it
finish    the history keeps the question and as much of the answer as was heard
discard   no trace: cache, history and turn count are as if nobody had asked
closed    with its conversation: every call raises UsageError
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.deprecation import old_method
from deeptalk_edge.errors import UsageError
from deeptalk_edge.lifetime import Lifetime, while_open
from deeptalk_edge.model.features import num_frames
from deeptalk_edge.model.prompt import Heard, Typed
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.backends.stages import GpuStages
from deeptalk_edge.runtime.decoding import Decoding
from deeptalk_edge.runtime.events import (
    AudioChunk,
    Metrics,
    NotUnderstood,
    TextPiece,
    Transcript,
)
from deeptalk_edge.runtime.history import History, PastTurn
from deeptalk_edge.runtime.lm.engine import Logits
from deeptalk_edge.runtime.meter import Meter
from deeptalk_edge.runtime.understanding import Judge, Judgement

Array = NDArray[np.float32]

Piece = TextPiece | AudioChunk | Transcript | NotUnderstood
Pieces = tuple[Piece, ...]


class Answer:
    """The answer to one question. `finish` or `discard` it, or the conversation stays occupied."""

    def __init__(
        self,
        question: Array | str,
        *,
        history: History,
        hear: Callable[[Array], Array],
        open_decoding: Callable[[Ids, Meter], Decoding],
        judge: Judge,
        lifetime: Lifetime,
        gpu_stages: GpuStages | None = None,
    ) -> None:
        """`hear` encodes 16 kHz PCM (N,) to features (n, C); `open_decoding` takes the prompt's
        last row; `lifetime` is the conversation's."""
        self._lifetime, self._gpu_stages = lifetime, gpu_stages
        if gpu_stages is not None:
            gpu_stages.begin()
        self._question, self._history = question, history
        self._hear, self._open_decoding, self._judge = hear, open_decoding, judge
        self._judgement: Judgement | None = None
        self._is_refused = False
        self._meter = Meter()
        self._user: Heard | Typed
        self._features: Array
        self._num_prompt_rows = 0
        self._before: int | None = None  # rows cached before the question, once it is fed
        self._turn: Decoding | None = None
        self._encoder_ms: float | None = None
        self._prefill_ms = 0.0
        self._steps = self._write()
        self.is_over = False
        """Whether it was finished or discarded."""
        self.stage = "encode"
        """What the next step does: encode, prefill, open or row."""

    @property
    def text(self) -> str:
        """What was written so far."""
        return self._turn.text.text if self._turn else ""

    @property
    def text_log_p(self) -> float | None:
        """How sure the model is of its first words, as a mean log-probability; None as long as it
        has not said enough of them."""
        return self._turn.text_log_p if self._turn else None

    @property
    def text_entropy(self) -> float | None:
        """Mean entropy of the text over the same rows, in nats; None likewise."""
        return self._turn.text_entropy if self._turn else None

    @property
    def features(self) -> Array | None:
        """What the encoder made of a spoken question, (n, C); None before, and for a typed one."""
        return None if self._encoder_ms is None else self._features

    @property
    def is_whole(self) -> bool | None:
        """Whether the question is whole, by the bundle's score for that; None as long as that is
        not known, or never."""
        return self._judgement.is_whole if self._judgement else None

    @while_open
    def advance(self) -> Pieces | None:
        """Do one step; returns what it brought, often nothing, or None if all is written.

        Raises AudioError if the PCM cannot be used, DoesNotFit if the question is too long for the
        context, BackendError or ExpertUnavailable if the model fails, UsageError if the
        conversation is closed, busy in another thread, or another process's.
        """
        if self.is_over:
            return None
        self._meter.resume()
        try:
            return next(self._steps, None)
        finally:
            self._meter.pause()

    @while_open
    def finish(self, heard_samples: int | None = None) -> str:
        """Leave the answer as far as it was heard in the history, all of it by default; returns
        the text that stays. A question that was not fed yet is discarded.

        Raises UsageError as `advance` does.
        """
        if self._turn is None or self._is_refused:
            self._forget()
            return ""
        if self.is_over:
            return ""
        self.is_over = True
        self._steps.close()
        kept = self._turn.close(heard_samples)
        turn = PastTurn(user=self._user, features=self._features, answer=kept.text_ids)
        self._history.append(turn, kept.pending_rows)
        return kept.text

    settle = old_method("settle", "finish")

    @while_open
    def discard(self) -> None:
        """Forget the question and the answer.

        Raises UsageError as `advance` does.
        """
        self._forget()

    def _forget(self) -> None:
        if self.is_over:
            return
        self.is_over = True
        self._steps.close()
        if self._turn is not None:
            self._turn.close(0)
        if self._before is not None:
            self._history.rollback(self._before)

    def metrics(self) -> Metrics:
        """What it cost so far.

        Raises UsageError if the question is not fed yet, or the conversation is closed.
        """
        self._lifetime.check()
        turn = self._turn
        understood_p = self._judgement.understood_p if self._judgement else None
        if turn is None and self._is_refused:
            return self._refused_metrics(understood_p)
        if turn is None:
            raise UsageError("metrics: the question is not fed yet; advance the answer first")
        return Metrics(
            num_prompt_rows=self._num_prompt_rows,
            num_rows=turn.rows.num_rows,
            encoder_ms=self._encoder_ms,
            prefill_ms=self._prefill_ms,
            first_frame_ms=turn.sound.first_frame_ms,
            first_sample_ms=turn.sound.first_sample_ms,
            step_ms_p50=_percentile(turn.step_ms, 50),
            step_ms_p95=_percentile(turn.step_ms, 95),
            compute_s=self._meter.elapsed_ms() / 1000,
            audio_s=turn.sound.audio_s,
            text_log_p=turn.text_log_p,
            understood_p=understood_p,
            right_p=self._judgement.right_p if self._judgement else None,
            gpu_ms=self._gpu_stages.summary() if self._gpu_stages else None,
            stopped="not_understood" if self._is_refused else turn.stopped,
            num_clamped=turn.rows.num_clamped,
        )

    def _refused_metrics(self, understood_p: float | None) -> Metrics:
        """Of a question that was not fed."""
        return Metrics(
            num_prompt_rows=0,
            num_rows=0,
            encoder_ms=self._encoder_ms,
            prefill_ms=0.0,
            first_frame_ms=None,
            first_sample_ms=None,
            step_ms_p50=None,
            step_ms_p95=None,
            compute_s=self._meter.elapsed_ms() / 1000,
            audio_s=0.0,
            text_log_p=None,
            understood_p=understood_p,
            right_p=None,
            gpu_ms=self._gpu_stages.summary() if self._gpu_stages else None,
            stopped="not_understood",
            num_clamped=0,
        )

    def _write(self) -> Generator[Pieces, None, None]:
        meter = self._meter
        if isinstance(self._question, str):
            self._user, self._features = Typed(text=self._question), self._history.no_features
        else:
            self._user = Heard(num_frames=num_frames(len(self._question)))
            self._features = self._hear(self._question)
            self._encoder_ms = meter.elapsed_ms()
            self._judgement = self._judge.of_features(self._features)
            self.stage = "prefill"
            yield (self._judgement.transcript,)
            if self._judgement.is_refused:
                yield self._refuse(self._judgement)
                return
        start_ms = meter.elapsed_ms()
        last_row, self._num_prompt_rows, self._before = self._history.prompt(
            self._user, self._features
        )
        self.stage = "open"
        yield ()
        self._turn = self._open_decoding(last_row, meter)
        logits = self._turn.open()
        self._prefill_ms = meter.elapsed_ms() - start_ms
        self.stage = "row"
        if self._judgement is None:
            yield from self._turn.run(logits)
        else:
            yield from self._judged(self._turn, logits, self._judgement)

    def _judged(
        self, turn: Decoding, logits: Logits, judgement: Judgement
    ) -> Generator[Pieces, None, None]:
        """Write on until the first rows' entropy is known; if that refuses the question, what was
        written until then is dropped."""
        waits, held = judgement.waits_for_entropy, list[Piece]()
        is_known = False
        for pieces in turn.run(logits):
            if not is_known and (mean := turn.text_entropy) is not None:
                is_known = True
                judgement.add_entropy(mean)
                if waits and judgement.is_refused:
                    yield self._refuse(judgement)
                    return
            if waits and not is_known:
                held += pieces
                yield ()
                continue
            yield (*held, *pieces)
            held.clear()
        yield tuple(held)

    def _refuse(self, judgement: Judgement) -> Pieces:
        self._is_refused = True
        refusal = NotUnderstood(judgement.understood_p or 0.0)
        return (refusal, AudioChunk(self._judge.line)) if self._judge.line.size else (refusal,)


def _percentile(values: list[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None
