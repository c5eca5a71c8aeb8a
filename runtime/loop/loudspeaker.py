"""The loudspeaker's side of the loop: the answer at hand, from the worker to the port.

budget    a speculative answer makes 1.5 s of sound until it is known how confident it is; one that
          sounds is made 2 s ahead of the listener; a paused one stops
void      what is delivered for another epoch belongs to no answer
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.audio.ports import SoundPort
from deeptalk_edge.runtime.events import (
    AnswerResumed,
    Interrupted,
    LiveEvent,
    SpeechEnded,
    TurnDone,
)
from deeptalk_edge.runtime.loop import signals
from deeptalk_edge.runtime.loop.clock import SampleClock
from deeptalk_edge.runtime.loop.model_worker import (
    AnswerFinished,
    Begin,
    Made,
    ModelWorker,
    Written,
)
from deeptalk_edge.runtime.loop.playback import Playback
from deeptalk_edge.runtime.loop.settings import ReplyPolicy
from deeptalk_edge.runtime.loop.states import Loop, State
from deeptalk_edge.runtime.loop.turn_timings import TurnTimings

Array = NDArray[np.float32]

_SPECULATIVE_S = 1.5
_AHEAD_S = 2.0

AnswerAction = (
    signals.CommitAnswer
    | signals.DiscardAnswer
    | signals.SetGain
    | signals.PausePlayback
    | signals.ResumePlayback
    | signals.InterruptAnswer
    | signals.FinishAnswer
)


class Loudspeaker:
    """Plays one answer after the other. One owner; not thread-safe."""

    def __init__(
        self,
        worker: ModelWorker,
        port: SoundPort,
        *,
        clock: SampleClock,
        emit: Callable[[LiveEvent], None],
    ) -> None:
        self._worker, self._port, self._emit = worker, port, emit
        self.policy = ReplyPolicy()
        """Of the answers that begin from now on."""
        self.timings = TurnTimings(port, clock)
        self._playback: Playback | None = None

    @property
    def epoch(self) -> int | None:
        """Of the answer at hand; None if there is none."""
        return None if self._playback is None else self._playback.epoch

    @property
    def is_interruptible(self) -> bool:
        """Whether speech over the answer at hand ends it."""
        return self._playback is not None and self._playback.policy.interruptible

    @property
    def is_heard(self) -> bool:
        """All of the answer at hand has sounded."""
        playback = self._playback
        return playback is not None and playback.is_committed and playback.is_heard

    @property
    def queued_ms(self) -> float:
        """Sound that waits in the port."""
        return self._port.queued * 1000 / self._port.rate_hz

    def begin(self, epoch: int, question: Array, now: int) -> None:
        """Have a question answered, silently, until it is committed."""
        self._playback = Playback(epoch, self._port)
        self.timings.begin(now)
        self._worker.post(Begin(epoch, question))
        self._worker.allow(epoch, int(_SPECULATIVE_S * self._port.rate_hz))

    def add(self, delivery: Made | Written) -> None:
        """Take more of the answer at hand, or that there is no more."""
        assert self._playback is not None
        if isinstance(delivery, Written):
            self._playback.is_written = True
            return
        for piece in delivery.pieces:
            self._playback.add(piece)

    def play(self) -> bool:
        """Send on what may sound, and show it; returns whether an answer began to sound."""
        playback = self._playback
        if playback is None:
            return False
        sent = playback.send()
        is_first = self.timings.follow(playback, has_sent=bool(sent))
        if playback.is_committed and not playback.is_paused:
            for piece in playback.text:
                self._emit(piece)
            playback.text.clear()
            for chunk in sent:
                self._emit(chunk)
            self._worker.allow(playback.epoch, playback.heard + int(_AHEAD_S * self._port.rate_hz))
        return is_first

    def do(self, action: AnswerAction, loop: Loop, now: int) -> None:
        """What the state machine wants of the answer at hand."""
        match action:
            case signals.SetGain(gain):
                self._port.set_gain(gain)
            case signals.CommitAnswer(epoch):
                self._commit(epoch, loop, now)
            case signals.DiscardAnswer(epoch):
                self.timings.discard(epoch)
                self._playback = None
                self._worker.post(action)
            case signals.PausePlayback():
                self._pause(loop)
            case signals.ResumePlayback():
                self._resume()
            case signals.InterruptAnswer(epoch):
                self._interrupt(epoch, is_lost=loop.state is State.RECOVERING)
            case signals.FinishAnswer():
                assert self._playback is not None
                self._finish(action, self._playback.made)

    def end_turn(self, finished: AnswerFinished) -> None:
        """An answer that was played is history."""
        voice = self.timings.finish(finished.epoch)
        self._emit(TurnDone(finished.text, finished.metrics, voice))

    def _commit(self, epoch: int, loop: Loop, now: int) -> None:
        assert self._playback is not None
        self._playback.policy, self._playback.is_committed = self.policy, True
        self._emit(SpeechEnded(self.timings.commit(epoch, loop.opened, loop.last_voice, now)))

    def _pause(self, loop: Loop) -> None:
        playback = self._playback
        assert playback is not None
        device_ms = (self._port.handed - self._port.audible()) * 1000 / self._port.rate_hz
        heard = playback.pause()
        self._worker.allow(playback.epoch, 0)
        self.timings.pause(playback.epoch, loop.opened, device_ms)
        self._emit(Interrupted(heard / self._port.rate_hz))

    def _resume(self) -> None:
        assert self._playback is not None
        self._playback.resume()
        self.timings.resume(self._playback.epoch)
        self._emit(AnswerResumed())

    def _interrupt(self, epoch: int, *, is_lost: bool) -> None:
        playback = self._playback
        assert playback is not None
        # A device that is gone plays no more of its buffer.
        heard = playback.audible if is_lost else playback.pause()
        kept = None if playback.policy.commit == "full" else heard
        self._finish(signals.FinishAnswer(epoch, kept), heard)

    def _finish(self, order: signals.FinishAnswer, heard: int) -> None:
        self.timings.end(order.epoch, heard)
        self._playback = None
        self._worker.post(order)
