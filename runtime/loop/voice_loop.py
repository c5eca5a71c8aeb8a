"""The loop itself: a frame of microphone in, events out; never waits and holds no lock.

microphone   cleans and keeps the sound (`microphone.py`)
machine      says what to do (`states.py`)
worker       makes the answer, elsewhere (`model_worker.py`)
loudspeaker  plays the answer and times its turn (`loudspeaker.py`)

The same code runs live, with the worker in its own thread, and on a virtual clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from deeptalk_edge.errors import DeviceLost
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.echo import EchoCanceller
from deeptalk_edge.runtime.audio.end_of_turn import EndOfTurn
from deeptalk_edge.runtime.audio.level import warn_if_quiet
from deeptalk_edge.runtime.audio.ports import MicFrame, SoundPort
from deeptalk_edge.runtime.audio.stop_words import WordSpotter
from deeptalk_edge.runtime.audio.vad import VoiceDetector
from deeptalk_edge.runtime.events import (
    LiveEvent,
    NothingSaid,
    Overloaded,
    SoundLost,
    SoundRestored,
    SpeechStarted,
    TurnFailed,
)
from deeptalk_edge.runtime.loop import signals, states
from deeptalk_edge.runtime.loop.clock import SampleClock
from deeptalk_edge.runtime.loop.loudspeaker import Loudspeaker
from deeptalk_edge.runtime.loop.microphone import Microphone
from deeptalk_edge.runtime.loop.model_worker import (
    AnswerFinished,
    ConfidenceKnown,
    Delivery,
    Failed,
    Made,
    ModelWorker,
    Written,
)
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.runtime.loop.signals import Command, Idle, StopWordHeard
from deeptalk_edge.runtime.loop.states import Loop, State
from deeptalk_edge.runtime.loop.stop_listener import StopListener
from deeptalk_edge.trace import Trace

_USERS = (State.USER_SPEAKING, State.ENDPOINTING)


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
        self._worker, self._end_of_turn = worker, end_of_turn
        self._emit, self._trace = emit, trace
        self.microphone = Microphone(
            max_question_samples=max_question_samples,
            detector=detector,
            canceller=canceller,
            clock=clock,
            stop_listener=StopListener(spotter, self.tell) if spotter else None,
        )
        self.loudspeaker = Loudspeaker(worker, port, clock=clock, emit=emit)
        self.loop = Loop()
        self.inbox: deque[Delivery] = deque()
        """Where the worker delivers."""
        self._commands: deque[Command | StopWordHeard] = deque()
        self._pressed = 0  # push-to-talk: when the button was
        self.num_overloaded = 0
        """Questions that were given up."""
        worker.post(Idle())

    @property
    def is_stopped(self) -> bool:
        return self.loop.state is State.STOPPED

    @property
    def is_idle(self) -> bool:
        """There is no voice, and every answer is history."""
        return self.loop.state is State.LISTENING and self.loudspeaker.timings.is_empty

    @property
    def is_recovering(self) -> bool:
        """The port is lost: `wait`, and `restore` once it is open again."""
        return self.loop.state is State.RECOVERING

    def tell(self, command: Command | StopWordHeard) -> None:
        """Give a command, or say that a stop word was heard; it is taken with the next frame."""
        self._commands.append(command)

    def push(self, frame: MicFrame) -> None:
        """Take 20 ms of microphone."""
        if num_missed := self.microphone.num_missed(frame):
            self._step(signals.SoundMissed(num_missed))
        with self._trace.span("frame"):
            is_voiced = self.microphone.push(frame)
            self._obey_commands()
            self._take_deliveries()
            self._step(signals.Frame(is_voiced))
            self._play()
        self._trace.count("queued_ms", self.loudspeaker.queued_ms)

    def serve(self) -> None:
        """Between two frames: hand on what has come from outside and from the worker."""
        self._obey_commands()
        self.microphone.num_waiting = 0
        if self.inbox:
            self._take_deliveries()
            self._play()

    def lose(self, error: DeviceLost) -> None:
        """The port is gone; call `wait` until it is back, then `restore`."""
        self._emit(SoundLost(error))
        self._step(Command.LOSE)

    def wait(self, samples: int) -> None:
        """Time passes without a port."""
        self.microphone.wait(samples)
        self._obey_commands()
        self._take_deliveries()
        self._step(signals.Frame(False))

    def restore(self) -> None:
        """The port is open again, its positions at 0."""
        self.microphone.reopen()
        self._step(Command.RESTORE)
        self._emit(SoundRestored())

    # Events into the machine ----------------------------------------------------------------------

    def _step(self, event: signals.Event) -> None:
        before = self.loop.state
        self.loop, actions = states.step(self.loop, event, self.microphone.now, self._settings)
        if self.loop.state is not before:
            self._trace.mark(self.loop.state.value, epoch=self.loop.epoch)
        if self.loop.state is State.USER_SPEAKING and before not in _USERS:
            self._emit(SpeechStarted())
        if before is State.USER_SPEAKING and self.loop.state is State.LISTENING:
            self._emit(NothingSaid())
        if self.loop.state is State.OVERLAP is not before:
            self.microphone.listen_for_stop_word(self.loop.opened, self._settings.pre_roll_ms)
        for action in actions:
            self._do(action)

    def _obey_commands(self) -> None:
        while self._commands:
            self._step(self._commands.popleft())

    def _take_deliveries(self) -> None:
        while self.inbox:
            delivery = self.inbox.popleft()
            if isinstance(delivery, AnswerFinished):
                self.loudspeaker.end_turn(delivery)
            elif delivery.epoch != self.loudspeaker.epoch:
                continue  # of an attempt that is void
            elif isinstance(delivery, (Made, Written)):
                self.loudspeaker.add(delivery)
            elif isinstance(delivery, ConfidenceKnown):
                enough_ms = self._end_of_turn.enough_ms(delivery.text_log_p, delivery.is_whole)
                if enough_ms is not None:
                    self._step(signals.HangoverShortened(enough_ms))
            elif isinstance(delivery, Failed):
                self._fail(delivery)

    def _fail(self, failed: Failed) -> None:
        if self.loop.state in (State.THINKING, State.SPEAKING, State.OVERLAP):
            self._emit(TurnFailed(failed.error))
        self._step(signals.AnswerFailed(failed.epoch))

    def _play(self) -> None:
        """Send on what may sound, and tell the machine how far it came."""
        speaker, microphone = self.loudspeaker, self.microphone
        began = speaker.play()
        epoch = speaker.epoch
        if epoch is None:
            return
        if began:
            self._step(signals.SoundBegan(epoch, speaker.is_interruptible, microphone.num_waiting))
            microphone.buffer.drop()
        if speaker.is_heard:
            self._step(signals.AnswerHeard(epoch))

    # Actions out of it ----------------------------------------------------------------------------

    def _do(self, action: signals.Action) -> None:
        microphone = self.microphone
        match action:
            case signals.UserStartedSpeaking(start):
                self._pressed = self.loop.opened
                microphone.buffer.open(start)
                self._worker.post(action)
            case signals.DropUtterance():
                microphone.buffer.drop()
            case signals.TellOverload(reason, samples):
                self.num_overloaded += 1
                self._emit(Overloaded(reason, samples / RATE_HZ))
            case signals.BeginAnswer(epoch, end):
                self.loudspeaker.begin(epoch, microphone.question(end), microphone.now)
            case signals.JudgePause(end):
                hangover_ms = self._end_of_turn.hangover_ms(microphone.question(end))
                self._step(signals.HangoverChosen(hangover_ms))
            case signals.Idle():
                self.loudspeaker.timings.forget_discarded()
                self._worker.post(action)
            case signals.Reset():
                self._worker.post(action)
                self._worker.post(Idle())
            case signals.CommitAnswer():
                self.loudspeaker.do(action, self.loop, microphone.now)
                self._warn_of_question()
            case signals.FinishAnswer():
                self.loudspeaker.do(action, self.loop, microphone.now)
                microphone.buffer.drop()
            case _:
                self.loudspeaker.do(action, self.loop, microphone.now)

    def _warn_of_question(self) -> None:
        """Say so if it is too quiet, or was cut because it is too long."""
        now = self.microphone.now
        warn_if_quiet(self.microphone.question(now))
        if self._settings.push_to_talk:  # the button, not the voice, was too long
            self._settings.warn_if_cut(now - self._pressed)
        else:
            self._settings.warn_if_cut(self.loop.last_voice - self.loop.opened)
