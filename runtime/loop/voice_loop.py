"""The loop itself: a frame of microphone in, events out; never waits and holds no lock.

ear        keeps the microphone's sound
machine    says what to do (`states.py`)
mind       makes the answer, elsewhere
reply      the answer on its way to the loudspeaker

The same code runs live, with the mind in a thread of its own, and on a virtual clock.
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
    BargedIn,
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
from deeptalk_edge.runtime.loop.ear import Ear
from deeptalk_edge.runtime.loop.mind import (
    Begin,
    Delivery,
    Discard,
    Expect,
    Failed,
    Gauged,
    Made,
    MakeRoom,
    Mind,
    Settle,
    Settled,
    StartAnew,
    Written,
)
from deeptalk_edge.runtime.loop.reply import Reply
from deeptalk_edge.runtime.loop.settings import LoopSettings, ReplyPolicy
from deeptalk_edge.runtime.loop.signals import Command, StopWordHeard
from deeptalk_edge.runtime.loop.states import Loop, State
from deeptalk_edge.runtime.loop.stop_listener import StopListener
from deeptalk_edge.trace import Trace

Array = NDArray[np.float32]

_TRIAL_S = 1.5  # of sound that an answer on trial makes: until it is known how sure it is
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
    was_on_trial: bool
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
        mind: Mind,
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
        self._mind, self._port = mind, port
        self._max_question_samples = max_question_samples
        self._detector, self._canceller = detector, canceller
        self._end_of_turn, self._clock, self._emit = end_of_turn, clock, emit
        self._trace = trace
        self.loop = Loop()
        self.policy = ReplyPolicy()
        """Of the answers that begin from now on."""
        self.inbox: deque[Delivery] = deque()
        """Where the mind delivers."""
        self._commands: deque[Command | StopWordHeard] = deque()
        self.stop_listener = StopListener(spotter, self.tell) if spotter else None
        """Works beside the loop; None if there are no stop words."""
        self._ear = Ear()
        self._reply: Reply | None = None
        self._timing: dict[int, _Timing] = {}  # of answers that are not settled yet
        self._num_discarded = 0
        self._pressed = 0  # push-to-talk: when the button was
        self._begun = 0  # when the attempt at hand was
        self._stop_word_end = 0  # where nobody listens for a stop word any more
        self._now = 0
        self._behind = 0  # samples of the microphone that wait to be read
        self.num_overloaded = 0
        """Questions that were given up."""
        self._offset = 0  # of the port's positions, which begin anew when it is reopened
        mind.post(MakeRoom())

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
            self._ear.push(start, pcm)
            self._obey_commands()
            self._take_deliveries()
            if self.stop_listener and start < self._stop_word_end:
                self.stop_listener.push(pcm)
            self._step(signals.Frame(self._detector.is_voiced(pcm)))
            self._play()
        self._trace.count("queued_ms", self._port.queued * 1000 / self._port.rate_hz)

    def serve(self) -> None:
        """Between two frames: hand on what has come from outside and from the mind."""
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
            listener.push(self._ear.sound(place, min(place + FRAME_SAMPLES, self._now)))

    def _obey_commands(self) -> None:
        while self._commands:
            self._step(self._commands.popleft())

    def _take_deliveries(self) -> None:
        while self.inbox:
            delivery = self.inbox.popleft()
            if isinstance(delivery, Settled):
                self._finish_turn(delivery)
            elif self._reply is None or delivery.epoch != self._reply.epoch:
                continue  # of an attempt that is void
            elif isinstance(delivery, Made):
                for piece in delivery.pieces:
                    self._reply.add(piece)
            elif isinstance(delivery, Gauged):
                enough_ms = self._end_of_turn.enough_ms(delivery.text_log_p)
                if enough_ms is not None:
                    self._step(signals.HangoverCapped(enough_ms))
            elif isinstance(delivery, Written):
                self._reply.is_written = True
            elif isinstance(delivery, Failed):
                self._fail(delivery)

    def _fail(self, failed: Failed) -> None:
        if self.loop.state in (State.THINKING, State.SPEAKING, State.OVERLAP):
            self._emit(TurnFailed(failed.error))
        self._step(signals.AnswerFailed(failed.epoch))

    def _play(self) -> None:
        """Send on what may sound, and tell the machine how far it came."""
        reply = self._reply
        if reply is None:
            return
        sent = reply.send()
        timing = self._timing.get(reply.epoch)
        if sent and timing and timing.queued is None:
            timing.queued = self._clock.now()
            self._step(signals.SoundBegan(reply.epoch, reply.policy.interruptible, self._behind))
            self._ear.drop()
        if timing and timing.audible is None and (audible := reply.audible):
            timing.audible = self._clock.now() - audible * RATE_HZ // self._port.rate_hz
        if reply.is_committed and not reply.is_held:
            events: list[LiveEvent] = [*reply.text, *sent]
            for event in events:
                self._emit(event)
            reply.text.clear()
            self._mind.allow(reply.epoch, reply.heard + int(_AHEAD_S * self._port.rate_hz))
        if reply.is_committed and reply.is_heard:
            self._step(signals.AnswerHeard(reply.epoch))

    # Actions out of it ----------------------------------------------------------------------------

    def _do(self, action: signals.Action) -> None:
        match action:
            case signals.OpenUtterance(start):
                self._pressed = self.loop.opened
                self._ear.open(start)
                self._mind.post(Expect())
            case signals.DropUtterance():
                self._ear.drop()
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
                self._reply = None
                self._mind.post(Discard(epoch))
            case signals.SetGain(gain):
                self._port.set_gain(gain)
            case signals.HoldAnswer():
                self._hold()
            case signals.ResumeAnswer():
                self._resume()
            case signals.CutAnswer(epoch):
                self._cut(epoch)
            case signals.KeepAnswer(epoch):
                assert self._reply is not None
                self._settle(epoch, self._reply.made, kept=None)
                self._ear.drop()
            case signals.Rest():
                self._num_discarded = 0
                self._mind.post(MakeRoom())
            case signals.Forget():
                self._mind.post(StartAnew())
                self._mind.post(MakeRoom())

    def _utterance(self, end: int) -> Array:
        return self._ear.utterance(end, longest=self._max_question_samples)

    def _begin(self, epoch: int, end: int) -> None:
        self._reply, self._begun = Reply(epoch, self._port), self._now
        self._mind.post(Begin(epoch, self._utterance(end)))
        self._mind.allow(epoch, int(_TRIAL_S * self._port.rate_hz))

    def _commit(self, epoch: int) -> None:
        assert self._reply is not None
        now = self._clock.now()
        self._reply.policy, self._reply.is_committed = self.policy, True
        self._timing[epoch] = timing = _Timing(
            opened=self.loop.opened,
            last_voice=self.loop.last_voice,
            committed=now,
            was_on_trial=self._begun < self._now,
            num_discarded=self._num_discarded,
            underruns_before=self._port.counters().underruns,
        )
        warn_if_quiet(self._utterance(self._now))
        if self._settings.push_to_talk:  # the button, not the voice, was too long
            self._settings.warn_if_cut(self._now - self._pressed)
        else:
            self._settings.warn_if_cut(self.loop.last_voice - self.loop.opened)
        self._emit(SpeechEnded(timing.speech_s))

    def _hold(self) -> None:
        reply = self._reply
        assert reply is not None
        device_ms = (self._port.handed - self._port.audible()) * 1000 / self._port.rate_hz
        heard = reply.hold()
        self._mind.allow(reply.epoch, 0)
        timing = self._timing[reply.epoch]
        timing.stop_ms = (self._clock.now() - self.loop.opened) / _SAMPLES_PER_MS + device_ms
        self._emit(BargedIn(heard / self._port.rate_hz))

    def _resume(self) -> None:
        assert self._reply is not None
        self._reply.resume()
        self._timing[self._reply.epoch].stop_ms = None
        self._emit(AnswerResumed())

    def _cut(self, epoch: int) -> None:
        reply = self._reply
        assert reply is not None
        # A device that is gone plays no more of its buffer.
        heard = reply.audible if self.loop.state is State.RECOVERING else reply.hold()
        self._settle(epoch, heard, kept=None if reply.policy.commit == "full" else heard)

    def _settle(self, epoch: int, heard: int, *, kept: int | None) -> None:
        self._timing[epoch].heard_samples = heard
        self._num_discarded = 0
        self._reply = None
        self._mind.post(Settle(epoch, kept))

    def _finish_turn(self, settled: Settled) -> None:
        timing = self._timing.pop(settled.epoch)
        voice = VoiceMetrics(
            speech_s=timing.speech_s,
            hangover_ms=(timing.committed - timing.last_voice) / _SAMPLES_PER_MS,
            was_on_trial=timing.was_on_trial,
            num_discarded=timing.num_discarded,
            queued_ms=_since(timing.last_voice, timing.queued),
            audible_ms=_since(timing.last_voice, timing.audible),
            heard_s=timing.heard_samples / self._port.rate_hz,
            underruns=self._port.counters().underruns - timing.underruns_before,
            stop_ms=timing.stop_ms,
        )
        self._emit(TurnDone(settled.text, settled.metrics, voice))


def _since(start: int, moment: int | None) -> float | None:
    return None if moment is None else (moment - start) / _SAMPLES_PER_MS
