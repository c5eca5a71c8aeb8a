"""A live conversation by voice: it runs in its own threads and gives events to the caller's.

audio    reads frames, runs the loop and writes sound; never waits for the model
model    owns the conversation; ONNX Runtime releases the interpreter lock while it computes
words    only with stop words: searches for one while the user speaks over an answer
beside   runs the caller's work: `run_beside`
caller   iterates over the events; a slow caller loses the oldest events, which are counted, and
         delays no other thread

An error that ends a thread ends the conversation and is raised to the caller as an EdgeError, by
the iterator or at the context's exit.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from deeptalk_edge import host
from deeptalk_edge.errors import DeviceLost, EdgeError, UsageError
from deeptalk_edge.lifetime import Lifetime
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.detectors import open_detector
from deeptalk_edge.runtime.audio.echo import EchoCanceller, open_canceller
from deeptalk_edge.runtime.audio.end_of_turn import EndOfTurn, open_end_of_turn
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES, SoundPort
from deeptalk_edge.runtime.audio.stop_words import SphinxSpotter, WordSpotter
from deeptalk_edge.runtime.audio.vad import VoiceDetector
from deeptalk_edge.runtime.events import LiveEvent
from deeptalk_edge.runtime.loop.clock import WallClock
from deeptalk_edge.runtime.loop.model_worker import Delivery, ModelWorker, Talker
from deeptalk_edge.runtime.loop.recorder import Recorder
from deeptalk_edge.runtime.loop.settings import LoopSettings, ReplyPolicy
from deeptalk_edge.runtime.loop.signals import Command
from deeptalk_edge.runtime.loop.stop_listener import StopListener
from deeptalk_edge.runtime.loop.voice_loop import VoiceLoop
from deeptalk_edge.trace import NO_TRACE, Trace

_MAX_EVENTS = 4096
_POLL_S = 0.005  # longest wait of a ready answer for the next frame
_RETRY_S = (0.5, 1.0, 2.0, 5.0)  # waits between tries to reopen a lost device
_YIELDS = 5  # niceness of the model's thread
_TICK_S = FRAME_SAMPLES / RATE_HZ

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hearing:
    """The parts that process the microphone's sound; by default the best that are installed."""

    detector: VoiceDetector = field(default_factory=open_detector)
    canceller: EchoCanceller = field(default_factory=open_canceller)
    end_of_turn: EndOfTurn | None = None
    """None: the adaptive one, by meaning where the talker knows whole questions."""
    spotter: Callable[[Sequence[str]], WordSpotter] = SphinxSpotter
    """Makes the spotter for the settings' stop words, if there are any."""


class LiveConversation:
    """Runs from `__enter__` to `__exit__`; iterate over its events in between.

    Before and after that, and in a forked child, every call raises UsageError, except `stop`, which
    then does nothing.
    """

    def __init__(
        self,
        talk: Talker,
        port: SoundPort,
        settings: LoopSettings | None = None,
        hearing: Hearing | None = None,
        *,
        recorder: Recorder | None = None,
        trace: Trace = NO_TRACE,
    ) -> None:
        settings, hearing = settings or LoopSettings(), hearing or Hearing()
        self._port, self._recorder = port, recorder
        self._events: deque[LiveEvent] = deque()
        self._is_ready = threading.Condition()
        self._is_closing = threading.Event()  # the audio thread has ended
        self._is_over = threading.Event()  # the model's thread has ended, too
        self._lifetime = Lifetime("the live conversation")
        self._is_entered = False
        self._failure: BaseException | None = None
        self._is_told = False
        self.num_dropped_events = 0
        self._worker = ModelWorker(talk, self._deliver, trace=trace)
        knows_whole = settings.is_speculating and talk.knows_whole
        self._loop = VoiceLoop(
            self._worker,
            port,
            settings=settings,
            max_question_samples=talk.max_question_samples,
            detector=hearing.detector,
            canceller=hearing.canceller,
            end_of_turn=hearing.end_of_turn or open_end_of_turn(knows_whole=knows_whole),
            spotter=hearing.spotter(settings.stop_words) if settings.stop_words else None,
            clock=WallClock(),
            emit=self._emit,
            trace=trace,
        )
        listener = self._loop.microphone.stop_listener
        self._threads = [
            self._thread("audio", self._hear, self._end_audio),
            self._thread("model", self._think, self._end_model),
        ]
        if listener:
            self._threads.append(self._thread("words", lambda: self._work(listener)))

    def __enter__(self) -> LiveConversation:
        """Raises BackendError if the system refuses a thread, UsageError the second time."""
        self._lifetime.check()
        if self._is_entered:
            raise UsageError("the live conversation was entered before; listen again for another")
        self._is_entered = True
        for number, thread in enumerate(self._threads):
            try:
                host.start_thread(thread)
            except BaseException:
                del self._threads[number:]
                self._leave()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raises the error that ended a thread, unless the iterator has raised it or another error
        is being raised."""
        if not self._lifetime.is_ours:
            return
        self._leave()
        if self.num_dropped_events:
            log.warning("%d events were dropped: the caller was too slow", self.num_dropped_events)
        if error is None and not self._is_told:
            self._raise_failure()

    def _leave(self) -> None:
        self.stop()
        for thread in self._threads:
            thread.join()
        self._lifetime.close()

    def __iter__(self) -> Iterator[LiveEvent]:
        """Yield events as they come, until the conversation is stopped.

        Raises DeviceLost if the device cannot be opened at first; a device that is lost later is
        reopened, or the conversation ends after `recovering_ms`. Raises EdgeError, from the
        original error, if an error in our code or in a part of the caller's ended it.
        """
        self._expect_entered()
        return self._take_events()

    def _take_events(self) -> Iterator[LiveEvent]:
        while True:
            self._lifetime.check_process()
            with self._is_ready:
                self._is_ready.wait_for(lambda: self._events or self._is_over.is_set())
                if not self._events:
                    break
                event = self._events.popleft()
            yield event
        self._raise_failure()

    @property
    def is_idle(self) -> bool:
        """Whether neither side speaks and every answer is in the history."""
        return self._loop.is_idle

    @property
    def num_overloaded(self) -> int:
        """Number of questions given up so far, each with an `Overloaded`."""
        return self._loop.num_overloaded

    def press(self) -> None:
        """Push-to-talk: the user takes the floor."""
        self._expect_entered()
        self._loop.tell(Command.PRESS)

    def release(self) -> None:
        """Push-to-talk: the user has finished."""
        self._expect_entered()
        self._loop.tell(Command.RELEASE)

    def interrupt(self) -> None:
        """End the answer."""
        self._expect_entered()
        self._loop.tell(Command.INTERRUPT)

    def set_policy(self, policy: ReplyPolicy) -> None:
        """Set what the user may do to answers that begin from now on; callable before
        `__enter__`."""
        self._lifetime.check()
        self._loop.loudspeaker.policy = policy

    def stop(self) -> None:
        """Stop listening; the remaining events can still be taken."""
        self._loop.tell(Command.STOP)

    def run_beside(self, name: str, work: Callable[[], None]) -> None:
        """Run the caller's work in a new thread that is not joined. An error in it ends the
        conversation and is raised like those of the conversation's threads.

        Raises BackendError if the system refuses the thread.
        """
        self._expect_entered()
        host.start_thread(self._thread(name, work))

    def _expect_entered(self) -> None:
        self._lifetime.check()
        if not self._is_entered:
            raise UsageError("the live conversation is not entered; use it as a context manager")

    def _emit(self, event: LiveEvent) -> None:
        with self._is_ready:
            if len(self._events) == _MAX_EVENTS:
                self._events.popleft()
                self.num_dropped_events += 1
            self._events.append(event)
            self._is_ready.notify()

    def _deliver(self, delivery: Delivery) -> None:
        self._loop.inbox.append(delivery)

    def _thread(
        self, name: str, work: Callable[[], None], end: Callable[[], None] = lambda: None
    ) -> threading.Thread:
        """Make a thread whose error is stored before `end` wakes the waiters."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._fail(error)
            finally:
                end()

        return threading.Thread(target=run, name=f"deeptalk {name}", daemon=True)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._loop.tell(Command.STOP)

    def _raise_failure(self) -> None:
        failure = self._failure
        if failure is None:
            return
        self._is_told = True
        if isinstance(failure, (EdgeError, KeyboardInterrupt, SystemExit)):
            raise failure
        raise EdgeError(
            f"the live conversation was ended by {type(failure).__name__}: {failure}; if the port, "
            "the detector and the other parts are not your own, report this as a fault of ours"
        ) from failure

    def _hear(self) -> None:
        loop, port = self._loop, self._port
        port.open()
        while not loop.is_stopped:
            try:
                frame = port.read(_POLL_S)
            except DeviceLost as error:
                self._recover(error)
                continue
            if frame is None:
                loop.serve()
                continue
            loop.push(frame)
            if self._recorder:
                self._recorder.push(frame)

    def _end_audio(self) -> None:
        try:
            self._port.close()
        except BaseException as error:
            self._fail(error)
        self._is_closing.set()
        self._worker.wake.set()
        if self._loop.microphone.stop_listener:
            self._loop.microphone.stop_listener.wake.set()

    def _recover(self, error: DeviceLost) -> None:
        """Try to reopen the port until it works, while the loop's time goes on."""
        loop, port = self._loop, self._port
        log.warning("%s", error)
        loop.lose(error)
        for attempt in itertools.count():
            port.close()
            pause_s = _RETRY_S[min(attempt, len(_RETRY_S) - 1)]
            for _ in range(round(pause_s / _TICK_S)):
                time.sleep(_TICK_S)
                loop.wait(FRAME_SAMPLES)
                if loop.is_stopped:
                    return
            try:
                port.open()
            except DeviceLost as again:
                log.info("%s", again)
                continue
            loop.restore()
            return

    def _work(self, worker: ModelWorker | StopListener) -> None:
        """Let the worker work until the audio thread has ended and no work is left."""
        host.yield_to_other_threads(_YIELDS)  # the audio thread has priority
        while True:
            worker.wake.clear()
            if worker.work():
                continue
            if self._is_closing.is_set():
                return
            worker.wake.wait()

    def _think(self) -> None:
        self._work(self._worker)
        self._loop.serve()  # the last turn; the audio thread no longer uses the loop

    def _end_model(self) -> None:
        self._is_over.set()
        with self._is_ready:
            self._is_ready.notify_all()
