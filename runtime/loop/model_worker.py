"""The model's side of the loop: it takes orders, does one step at a time, and delivers text and
sound.

One thread owns the worker and, through it, the conversation. The other side posts orders and sets
the budget: the amount of sound it wants so far. A spent budget stops the model within one step, and
a new budget lets it continue, so undelivered and delivered sound are bounded.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import EdgeError
from deeptalk_edge.runtime.events import AudioChunk, Metrics, Pieces
from deeptalk_edge.runtime.loop.signals import (
    DiscardAnswer,
    FinishAnswer,
    Idle,
    Reset,
    UserStartedSpeaking,
)
from deeptalk_edge.trace import Trace

Array = NDArray[np.float32]

log = logging.getLogger(__name__)


class OpenAnswer(Protocol):
    """The part of an `Answer` that the worker uses."""

    stage: str
    """Kind of the next step."""

    @property
    def text_log_p(self) -> float | None:
        """Confidence in the first words; None if it is not known yet, or never."""

    @property
    def is_whole(self) -> bool | None:
        """Whether the question is whole; known with `text_log_p`, or never."""

    def advance(self) -> Pieces | None:
        """Do one step."""

    def finish(self, heard_samples: int | None = None) -> str:
        """Keep the answer in the history."""

    def discard(self) -> None:
        """Remove question and answer without a trace."""

    def metrics(self) -> Metrics:
        """Return the answer's costs."""


class Talker(Protocol):
    """The part of a `Conversation` that the worker uses."""

    @property
    def rate_hz(self) -> int:
        """Rate of the answers' sound."""

    @property
    def max_question_samples(self) -> int:
        """Longest question in samples at 16 kHz."""

    @property
    def knows_whole(self) -> bool:
        """Whether answers tell if the question is whole."""

    def user_started_speaking(self) -> None:
        """The user has begun to speak."""

    def begin(self, question: Array | str) -> OpenAnswer:
        """Begin an answer, to be advanced."""

    def idle(self) -> int:
        """Neither side speaks: call `trim_history`, and let likely experts be read."""

    def trim_history(self) -> int:
        """Drop old turns, and feed the system prompt."""

    def reset(self) -> None:
        """Begin a new conversation."""


# Orders -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """Answer this utterance."""

    epoch: int
    question: Array


Order: TypeAlias = UserStartedSpeaking | Begin | DiscardAnswer | FinishAnswer | Idle | Reset
"""All but `Begin` are the state machine's actions, unchanged."""


# Deliveries ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Made:
    """More text and sound."""

    epoch: int
    pieces: Pieces


@dataclass(frozen=True, slots=True)
class ConfidenceKnown:
    """The model's confidence in the answer's first words is known."""

    epoch: int
    text_log_p: float
    is_whole: bool | None
    """Whether the question is whole; None if the bundle cannot tell."""


@dataclass(frozen=True, slots=True)
class Written:
    """The answer is complete."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed."""

    epoch: int
    error: EdgeError


@dataclass(frozen=True, slots=True)
class AnswerFinished:
    """The turn is in the history, with this text."""

    epoch: int
    text: str
    metrics: Metrics


Delivery: TypeAlias = Made | ConfidenceKnown | Written | Failed | AnswerFinished


class ModelWorker:
    """Owns a conversation. `post` and `allow` may be called from another thread."""

    def __init__(self, talk: Talker, deliver: Callable[[Delivery], None], *, trace: Trace) -> None:
        self._talk, self._deliver, self._trace = talk, deliver, trace
        self._orders: deque[Order] = deque()
        self._budget = (-1, 0)  # epoch and samples; one tuple, so both change at once
        self._epoch = -1
        self._answer: OpenAnswer | None = None
        self._made_samples = 0
        self._is_written = False
        self._is_confidence_known = False
        self.wake = threading.Event()
        """Set when there may be something to do."""

    def post(self, order: Order) -> None:
        """Post an order; orders are taken in sequence, before any further step."""
        self._orders.append(order)
        self.wake.set()

    def allow(self, epoch: int, num_samples: int) -> None:
        """Let the answer continue while it has made less sound than this."""
        if self._budget != (epoch, num_samples):
            self._budget = (epoch, num_samples)
            self.wake.set()

    def work(self) -> bool:
        """Take an order or do one step of the answer; False if there is nothing to do.

        Errors other than EdgeError are bugs and are raised.
        """
        if self._orders:
            self._obey(self._orders.popleft())
            return True
        if self._answer is None or self._is_written:
            return False
        epoch, num_samples = self._budget
        if epoch != self._epoch or self._made_samples >= num_samples:
            return False
        self._advance(self._answer)
        return True

    def _advance(self, answer: OpenAnswer) -> None:
        try:
            with self._trace.span(answer.stage, epoch=self._epoch):
                pieces = answer.advance()
        except EdgeError as error:
            self._is_written = True  # an order decides whether it is kept
            self._deliver(Failed(self._epoch, error))
            return
        if pieces is None:
            self._is_written = True
            self._deliver(Written(self._epoch))
        elif pieces:
            self._made_samples += sum(p.pcm.size for p in pieces if isinstance(p, AudioChunk))
            self._deliver(Made(self._epoch, pieces))
        if not self._is_confidence_known and (log_p := answer.text_log_p) is not None:
            self._is_confidence_known = True
            self._deliver(ConfidenceKnown(self._epoch, log_p, answer.is_whole))

    def _obey(self, order: Order) -> None:
        match order:
            case UserStartedSpeaking():
                self._talk.user_started_speaking()
            case Begin():
                self._epoch, self._made_samples = order.epoch, 0
                self._is_written = self._is_confidence_known = False
                self._answer = self._talk.begin(order.question)
            case DiscardAnswer() if self._answer is not None and order.epoch == self._epoch:
                self._answer.discard()
                self._answer = None
            case FinishAnswer() if self._answer is not None and order.epoch == self._epoch:
                answer, self._answer = self._answer, None
                text = answer.finish(order.heard_samples)
                metrics = answer.metrics()
                for stage, ms in (metrics.gpu_ms or {}).items():
                    self._trace.count(f"gpu_{stage}_ms", ms)
                self._deliver(AnswerFinished(order.epoch, text, metrics))
                self._between_turns(self._talk.trim_history)  # now, because the user may speak soon
            case Idle():
                self._between_turns(self._talk.idle)
            case Reset():
                self._talk.reset()

    def _between_turns(self, trim_history: Callable[[], int]) -> None:
        """Do work between turns and log its error: the next question does the work again and
        raises."""
        try:
            with self._trace.span("trim history"):
                trim_history()
        except EdgeError as error:
            log.warning("between turns: %s", error)
