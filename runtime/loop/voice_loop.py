"""The loop itself: a frame of microphone in, events out; never waits and holds no lock.

mic buffer keeps the microphone's sound
machine    says what to do (`states.py`)
worker     makes the answer, elsewhere
playback   the answer on its way to the loudspeaker

The same code runs live, with the worker in a thread of its own, and on a virtual clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import DeviceLost
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.echo import EchoCanceller
from deeptalk_edge.runtime.audio.end_of_turn import EndOfTurn
from deeptalk_edge.runtime.audio.level import warn_if_quiet
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES, MicFrame, SoundPort
from deeptalk_edge.runtime.audio.stop_words import WordSpotter
from deeptalk_edge.runtime.audio.vad import VoiceDetector
from deeptalk_edge.runtime.events import (
    AnswerResumed,
    Interrupted,
    LiveEvent,
    NothingSaid,
    Overloaded,
    SoundLost,
    SoundRestored,
    SpeechEnded,
    SpeechStarted,
    TurnDone,
    TurnFailed,
    VoiceMetrics,
)
from deeptalk_edge.runtime.loop import signals, states
from deeptalk_edge.runtime.loop.mic_buffer import MicBuffer
from deeptalk_edge.runtime.loop.model_worker import (
    AnswerFinished,
    Begin,
    ConfidenceKnown,
    Delivery,
    Failed,
    Made,
    ModelWorker,
    Written,
)
from deeptalk_edge.runtime.loop.playback import Playback
from deeptalk_edge.runtime.loop.settings import LoopSettings, ReplyPolicy
from deeptalk_edge.runtime.loop.signals import Command, FinishAnswer, Idle, StopWordHeard
from deeptalk_edge.runtime.loop.states import Loop, State
from deeptalk_edge.runtime.loop.stop_listener import StopListener
from deeptalk_edge.trace import Trace

Array = NDArray[np.float32]

_SPECULATIVE_S = 1.5  # of sound that a speculative answer makes: until it is known how sure it is
_AHEAD_S = 2.0  # of sound that the model is ahead of the listener
_SAMPLES_PER_MS = states.SAMPLES_PER_MS
_STOP_WORD_MS = 1000  # from a voice's first sound over an answer to the end of a stop word
_USERS = (State.USER_SPEAKING, State.ENDPOINTING)


class SampleClock(Protocol):
    """Where the microphone is."""

    def arrived(self, sample: int) -> None:
        """The frame that ends there is here."""

    def now(self) -> int:
        """The sample that is due now."""


@dataclass(slots=True)
class _Timing:
    """When things happened to one answer, in samples of the microphone."""

    opened: int
    last_voice: int
    committed: int
    was_speculative: bool
    num_discarded: int
    underruns_before: int
    queued: int | None = None
    audible: int | None = None
    stop_ms: float | None = None
    heard_samples: int = 0

    @property
    def speech_s(self) -> float:
        return (self.last_voice - self.opened) / RATE_HZ


class VoiceLoop:
    """One conversation by voice. One owner; not thread-safe but for `tell`."""

    def __init__(
        self,
        worker: ModelWorker,
        port: SoundPort,
        *,
        settings: LoopSettings,
        max_question_samples: int,
        detector: VoiceDetector,
        canceller: EchoCanceller,
        end_of_turn: EndOfTurn,
        spotter: WordSpotter | None,
        clock: SampleClock,
        emit: Callable[[LiveEvent], None],
        trace: Trace,
    ) -> None:
        self._settings = settings.within(max_question_samples)
        self._worker, self._port = worker, port
        self._max_question_samples = max_question_samples
        self._detector, self._canceller = detector, canceller
        self._end_of_turn, self._clock, self._emit = end_of_turn, clock, emit
        self._trace = trace
        self.loop = Loop()
        self.policy = ReplyPolicy()
        """Of the answers that begin from now on."""
        self.inbox: deque[Delivery] = deque()
        """Where the worker delivers."""
        self._commands: deque[Command | StopWordHeard] = deque()
        self.stop_listener = StopListener(spotter, self.tell) if spotter else None
        """Works beside the loop; None if there are no stop words."""
        self._mic_buffer = MicBuffer()
        self._playback: Playback | None = None
        self._timing: dict[int, _Timing] = {}  # of answers that are not finished yet
        self._num_discarded = 0
        self._pressed = 0  # push-to-talk: when the button was
        self._begun = 0  # when the attempt at hand was
        self._stop_word_end = 0  # where nobody listens for a stop word any more
        self._now = 0
        self._behind = 0  # samples of the microphone that wait to be read
        self.num_overloaded = 0
        """Questions that were given up."""
        self._offset = 0  # of the port's positions, which begin anew when it is reopened
        worker.post(Idle())

    @property
    def is_stopped(self) -> bool:
        return self.loop.state is State.STOPPED

    @property
    def is_idle(self) -> bool:
        """Nobody speaks, and every answer is history."""
        return self.loop.state is State.LISTENING and not self._timing

    @property
    def is_recovering(self) -> bool:
        """The port is lost: `wait`, and `restore` once it is open again."""
        return self.loop.state is State.RECOVERING

    def tell(self, command: Command | StopWordHeard) -> None:
        """Give a command, or say that a stop word was heard; it is taken with the next frame."""
        self._commands.append(command)

    def push(self, frame: MicFrame) -> None:
        """Take 20 ms of microphone."""
        start = self._offset + frame.start
        if start > self._now:
            self._step(signals.SoundMissed(start - self._now))
        self._now = start + FRAME_SAMPLES
        self._behind = frame.num_waiting * FRAME_SAMPLES
        self._clock.arrived(self._now)
        with self._trace.span("frame"):
            pcm = self._canceller.process(frame.pcm, frame.far)
            self._mic_buffer.push(start, pcm)
            self._obey_commands()
            self._take_deliveries()
            if self.stop_listener and start < self._stop_word_end:
                self.stop_listener.push(pcm)
            self._step(signals.Frame(self._detector.is_voiced(pcm)))
            self._play()
        self._trace.count("queued_ms", self._port.queued * 1000 / self._port.rate_hz)

    def serve(self) -> None:
        """Between two frames: hand on what has come from outside and from the worker."""
        self._obey_commands()
        self._behind = 0
        if self.inbox:
            self._take_deliveries()
            self._play()

    def lose(self, error: DeviceLost) -> None:
        """The port is gone; call `wait` until it is back, then `restore`."""
        self._emit(SoundLost(error))
        self._step(Command.LOSE)

    def wait(self, samples: int) -> None:
        """Time passes without a port."""
        self._now += samples
        self._obey_commands()
        self._take_deliveries()
        self._step(signals.Frame(False))

    def restore(self) -> None:
        """The port is open again, its positions at 0."""
        self._offset = self._now
        self._step(Command.RESTORE)
        self._emit(SoundRestored())

    # Events into the machine ----------------------------------------------------------------------

    def _step(self, event: signals.Event) -> None:
        before = self.loop.state
        self.loop, actions = states.step(self.loop, event, self._now, self._settings)
        if self.loop.state is not before:
            self._trace.mark(self.loop.state.value, epoch=self.loop.epoch)
        if self.loop.state is State.USER_SPEAKING and before not in _USERS:
            self._emit(SpeechStarted())
        if before is State.USER_SPEAKING and self.loop.state is State.LISTENING:
            self._emit(NothingSaid())
        if self.stop_listener and self.loop.state is State.OVERLAP is not before:
            self._listen_for_stop_word(self.stop_listener)
        for action in actions:
            self._do(action)

    def _listen_for_stop_word(self, listener: StopListener) -> None:
        """Now, and in the frames that come: somebody speaks over the answer."""
        opened = self.loop.opened
        self._stop_word_end = opened + _STOP_WORD_MS * _SAMPLES_PER_MS
        listener.begin(opened)
        start = max(opened - self._settings.pre_roll_ms * _SAMPLES_PER_MS, 0)
        for place in range(start, self._now, FRAME_SAMPLES):
            listener.push(self._mic_buffer.sound(place, min(place + FRAME_SAMPLES, self._now)))

    def _obey_commands(self) -> None:
        while self._commands:
            self._step(self._commands.popleft())

    def _take_deliveries(self) -> None:
        while self.inbox:
            delivery = self.inbox.popleft()
            if isinstance(delivery, AnswerFinished):
                self._finish_turn(delivery)
            elif self._playback is None or delivery.epoch != self._playback.epoch:
                continue  # of an attempt that is void
            elif isinstance(delivery, Made):
                for piece in delivery.pieces:
                    self._playback.add(piece)
            elif isinstance(delivery, ConfidenceKnown):
                enough_ms = self._end_of_turn.enough_ms(delivery.text_log_p, delivery.is_whole)
                if enough_ms is not None:
                    self._step(signals.HangoverShortened(enough_ms))
            elif isinstance(delivery, Written):
                self._playback.is_written = True
            elif isinstance(delivery, Failed):
                self._fail(delivery)

    def _fail(self, failed: Failed) -> None:
        if self.loop.state in (State.THINKING, State.SPEAKING, State.OVERLAP):
            self._emit(TurnFailed(failed.error))
        self._step(signals.AnswerFailed(failed.epoch))

    def _play(self) -> None:
        """Send on what may sound, and tell the machine how far it came."""
        playback = self._playback
        if playback is None:
            return
        sent = playback.send()
        timing = self._timing.get(playback.epoch)
        if sent and timing and timing.queued is None:
            timing.queued = self._clock.now()
            self._step(
                signals.SoundBegan(playback.epoch, playback.policy.interruptible, self._behind)
            )
            self._mic_buffer.drop()
        if timing and timing.audible is None and (audible := playback.audible):
            timing.audible = self._clock.now() - audible * RATE_HZ // self._port.rate_hz
        if playback.is_committed and not playback.is_paused:
            events: list[LiveEvent] = [*playback.text, *sent]
            for event in events:
                self._emit(event)
            playback.text.clear()
            self._worker.allow(playback.epoch, playback.heard + int(_AHEAD_S * self._port.rate_hz))
        if playback.is_committed and playback.is_heard:
            self._step(signals.AnswerHeard(playback.epoch))

    # Actions out of it ----------------------------------------------------------------------------

    def _do(self, action: signals.Action) -> None:
        match action:
            case signals.UserStartedSpeaking(start):
                self._pressed = self.loop.opened
                self._mic_buffer.open(start)
                self._worker.post(action)
            case signals.DropUtterance():
                self._mic_buffer.drop()
            case signals.TellOverload(reason, samples):
                self.num_overloaded += 1
                self._emit(Overloaded(reason, samples / RATE_HZ))
            case signals.BeginAnswer(epoch, end):
                self._begin(epoch, end)
            case signals.JudgePause(end):
                pcm = self._utterance(end)
                self._step(signals.HangoverChosen(self._end_of_turn.hangover_ms(pcm)))
            case signals.CommitAnswer(epoch):
                self._commit(epoch)
            case signals.DiscardAnswer(epoch):
                self._num_discarded += 1
                self._timing.pop(epoch, None)
                self._playback = None
                self._worker.post(action)
            case signals.SetGain(gain):
                self._port.set_gain(gain)
            case signals.PausePlayback():
                self._pause()
            case signals.ResumePlayback():
                self._resume()
            case signals.InterruptAnswer(epoch):
                self._interrupt(epoch)
            case signals.FinishAnswer(epoch):
                assert self._playback is not None
                self._finish(action, self._playback.made)
                self._mic_buffer.drop()
            case signals.Idle():
                self._num_discarded = 0
                self._worker.post(action)
            case signals.Reset():
                self._worker.post(action)
                self._worker.post(Idle())

    def _utterance(self, end: int) -> Array:
        return self._mic_buffer.utterance(end, longest=self._max_question_samples)

    def _begin(self, epoch: int, end: int) -> None:
        self._playback, self._begun = Playback(epoch, self._port), self._now
        self._worker.post(Begin(epoch, self._utterance(end)))
        self._worker.allow(epoch, int(_SPECULATIVE_S * self._port.rate_hz))

    def _commit(self, epoch: int) -> None:
        assert self._playback is not None
        now = self._clock.now()
        self._playback.policy, self._playback.is_committed = self.policy, True
        self._timing[epoch] = timing = _Timing(
            opened=self.loop.opened,
            last_voice=self.loop.last_voice,
            committed=now,
            was_speculative=self._begun < self._now,
            num_discarded=self._num_discarded,
            underruns_before=self._port.counters().underruns,
        )
        warn_if_quiet(self._utterance(self._now))
        if self._settings.push_to_talk:  # the button, not the voice, was too long
            self._settings.warn_if_cut(self._now - self._pressed)
        else:
            self._settings.warn_if_cut(self.loop.last_voice - self.loop.opened)
        self._emit(SpeechEnded(timing.speech_s))

    def _pause(self) -> None:
        playback = self._playback
        assert playback is not None
        device_ms = (self._port.handed - self._port.audible()) * 1000 / self._port.rate_hz
        heard = playback.pause()
        self._worker.allow(playback.epoch, 0)
        timing = self._timing[playback.epoch]
        timing.stop_ms = (self._clock.now() - self.loop.opened) / _SAMPLES_PER_MS + device_ms
        self._emit(Interrupted(heard / self._port.rate_hz))

    def _resume(self) -> None:
        assert self._playback is not None
        self._playback.resume()
        self._timing[self._playback.epoch].stop_ms = None
        self._emit(AnswerResumed())

    def _interrupt(self, epoch: int) -> None:
        playback = self._playback
        assert playback is not None
        # A device that is gone plays no more of its buffer.
        heard = playback.audible if self.loop.state is State.RECOVERING else playback.pause()
        kept = None if playback.policy.commit == "full" else heard
        self._finish(FinishAnswer(epoch, kept), heard)

    def _finish(self, order: FinishAnswer, heard: int) -> None:
        self._timing[order.epoch].heard_samples = heard
        self._num_discarded = 0
        self._playback = None
        self._worker.post(order)

    def _finish_turn(self, finished: AnswerFinished) -> None:
        timing = self._timing.pop(finished.epoch)
        voice = VoiceMetrics(
            speech_s=timing.speech_s,
            hangover_ms=(timing.committed - timing.last_voice) / _SAMPLES_PER_MS,
            was_speculative=timing.was_speculative,
            num_discarded=timing.num_discarded,
            queued_ms=_since(timing.last_voice, timing.queued),
            audible_ms=_since(timing.last_voice, timing.audible),
            heard_s=timing.heard_samples / self._port.rate_hz,
            underruns=self._port.counters().underruns - timing.underruns_before,
            stop_ms=timing.stop_ms,
        )
        self._emit(TurnDone(finished.text, finished.metrics, voice))


def _since(start: int, moment: int | None) -> float | None:
    return None if moment is None else (moment - start) / _SAMPLES_PER_MS
