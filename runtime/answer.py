"""An answer on its way: advanced in small steps, then finished into the history or discarded.

step      one graph run or one row at a time, so the caller can stop between two
refused   a spoken line takes the answer's place; to finish it is to discard it
finish    the history keeps the question and as much of the answer as was heard
discard   no trace: cache, history and turn count are as before the question
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
from deeptalk_edge.runtime.answer_cost import AnswerCost
from deeptalk_edge.runtime.backends.stages import GpuStages
from deeptalk_edge.runtime.decoding import Decoding
from deeptalk_edge.runtime.events import Metrics, Pieces
from deeptalk_edge.runtime.history import History, PastTurn
from deeptalk_edge.runtime.meter import Meter
from deeptalk_edge.runtime.understanding import Judge
from deeptalk_edge.runtime.verdict import Verdict

Array = NDArray[np.float32]


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
        self._lifetime = lifetime
        self._cost, self._verdict = AnswerCost(gpu_stages), Verdict(judge)
        self._question, self._history = question, history
        self._hear, self._open_decoding = hear, open_decoding
        self._user: Heard | Typed
        self._features: Array
        self._before: int | None = None  # rows cached before the question, once it is fed
        self._decoding: Decoding | None = None
        self._steps = self._write()
        self.is_over = False
        """Whether it was finished or discarded."""
        self.stage = "encode"
        """What the next step does: encode, prefill, open or row."""

    @property
    def text(self) -> str:
        """What was written so far."""
        return self._decoding.text.text if self._decoding else ""

    @property
    def text_log_p(self) -> float | None:
        """How sure the model is of its first words, as a mean log-probability; None as long as it
        has not said enough of them."""
        return self._decoding.text_log_p if self._decoding else None

    @property
    def text_entropy(self) -> float | None:
        """Mean entropy of the text over the same rows, in nats; None likewise."""
        return self._decoding.text_entropy if self._decoding else None

    @property
    def features(self) -> Array | None:
        """What the encoder made of a spoken question, (n, C); None before, and for a typed one."""
        return None if self._cost.encoder_ms is None else self._features

    @property
    def is_whole(self) -> bool | None:
        """Whether the question is whole, by the bundle's score for that; None as long as that is
        not known, or never."""
        judgement = self._verdict.judgement
        return judgement.is_whole if judgement else None

    @while_open
    def advance(self) -> Pieces | None:
        """Do one step; returns what it brought, often nothing, or None if all is written.

        Raises AudioError if the PCM cannot be used, DoesNotFit if the question is too long for the
        context, BackendError or ExpertUnavailable if the model fails, UsageError if the
        conversation is closed, busy in another thread, or another process's.
        """
        if self.is_over:
            return None
        self._cost.meter.resume()
        try:
            return next(self._steps, None)
        finally:
            self._cost.meter.pause()

    @while_open
    def finish(self, heard_samples: int | None = None) -> str:
        """Leave the answer as far as it was heard in the history, all of it by default; returns
        the text that stays. A question that was not fed yet is discarded.

        Raises UsageError as `advance` does.
        """
        if self._decoding is None or self._verdict.is_refused:
            self._forget()
            return ""
        if self.is_over:
            return ""
        self.is_over = True
        self._steps.close()
        kept = self._decoding.close(heard_samples)
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
        if self._decoding is not None:
            self._decoding.close(0)
        if self._before is not None:
            self._history.rollback(self._before)

    def metrics(self) -> Metrics:
        """What it cost so far.

        Raises UsageError if the question is not fed yet, or the conversation is closed.
        """
        self._lifetime.check()
        if self._decoding is None and not self._verdict.is_refused:
            raise UsageError("metrics: the question is not fed yet; advance the answer first")
        return self._cost.metrics(self._decoding, self._verdict)

    def _write(self) -> Generator[Pieces, None, None]:
        cost, meter = self._cost, self._cost.meter
        if isinstance(self._question, str):
            self._user, self._features = Typed(text=self._question), self._history.no_features
        else:
            self._user = Heard(num_frames=num_frames(len(self._question)))
            self._features = self._hear(self._question)
            cost.encoder_ms = meter.elapsed_ms()
            judgement = self._verdict.judge_features(self._features)
            self.stage = "prefill"
            yield (judgement.transcript,)
            if judgement.is_refused:
                yield self._verdict.refuse(judgement)
                return
        start_ms = meter.elapsed_ms()
        last_row, cost.num_prompt_rows, self._before = self._history.prompt(
            self._user, self._features
        )
        self.stage = "open"
        yield ()
        self._decoding = self._open_decoding(last_row, meter)
        logits = self._decoding.open()
        cost.prefill_ms = meter.elapsed_ms() - start_ms
        self.stage = "row"
        yield from self._verdict.judged(self._decoding, logits)
