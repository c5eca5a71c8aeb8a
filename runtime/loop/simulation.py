"""The voice loop on a virtual clock, in one thread: deterministic, and as fast as the machine
allows.

The model's steps take a given virtual time, not the time they take on this machine, so every time
that a simulation reports is simulated.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Callable

from deeptalk_edge.errors import DeviceLost
from deeptalk_edge.runtime.audio.echo import EchoCanceller, NoCanceller
from deeptalk_edge.runtime.audio.end_of_turn import EndOfTurn, FixedHangover
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES
from deeptalk_edge.runtime.audio.stop_words import WordSpotter
from deeptalk_edge.runtime.audio.vad import VoiceDetector
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort
from deeptalk_edge.runtime.events import LiveEvent
from deeptalk_edge.runtime.loop.clock import FrameClock
from deeptalk_edge.runtime.loop.model_worker import Delivery, ModelWorker, Talker
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.runtime.loop.states import SAMPLES_PER_MS
from deeptalk_edge.runtime.loop.voice_loop import VoiceLoop
from deeptalk_edge.trace import NO_TRACE

_RETRY_FRAMES = 25  # 0.5 s before each try to reopen a lost port


class Simulation:
    """A talker, a virtual port and the voice loop."""

    def __init__(
        self,
        talk: Talker,
        port: VirtualPort,
        *,
        detector: VoiceDetector,
        settings: LoopSettings | None = None,
        end_of_turn: EndOfTurn | None = None,
        canceller: EchoCanceller | None = None,
        spotter: WordSpotter | None = None,
        step_ms: Callable[[], float],
        emit: Callable[[LiveEvent], None],
    ) -> None:
        """`step_ms` returns the virtual time of the talker's last step."""
        self._port, self._step_ms = port, step_ms
        self._now = 0
        self._busy_until = 0.0  # the model's thread is busy until then, in samples
        self._made: list[Delivery] = []
        self._due: list[tuple[float, int, Delivery]] = []  # a heap ordered by time and sequence
        self._num_deliveries = 0
        self.worker = ModelWorker(talk, self._made.append, trace=NO_TRACE)
        settings = settings or LoopSettings()
        self.loop = VoiceLoop(
            self.worker,
            port,
            settings=settings,
            max_question_samples=talk.max_question_samples,
            detector=detector,
            canceller=canceller or NoCanceller(),
            end_of_turn=end_of_turn or FixedHangover(settings.hangover_ms),
            spotter=spotter,
            clock=FrameClock(),
            emit=emit,
            trace=NO_TRACE,
        )
        port.open()

    @property
    def seconds(self) -> float:
        """Virtual time so far."""
        return self._now / SAMPLES_PER_MS / 1000

    def run(self, seconds: float) -> None:
        """Advance the virtual time."""
        end = self._now + int(seconds * 1000 * SAMPLES_PER_MS)
        while self._now < end and not self.loop.is_stopped:
            if self.loop.is_recovering:
                self._try_to_reopen()
                continue
            self._think()
            try:
                frame = self._port.read(0.0)
            except DeviceLost as error:
                self.loop.lose(error)
                continue
            assert frame is not None  # a virtual port always has a frame
            self._now += FRAME_SAMPLES
            self.loop.push(frame)
            while self.loop.microphone.stop_listener and self.loop.microphone.stop_listener.work():
                pass

    def _think(self) -> None:
        """Do the model thread's work until now, and deliver finished pieces."""
        self._busy_until = max(self._busy_until, float(self._now - FRAME_SAMPLES))
        while self._busy_until <= self._now and self.worker.work():
            self._busy_until += self._step_ms() * SAMPLES_PER_MS
            for delivery in self._made:
                self._num_deliveries += 1
                heapq.heappush(self._due, (self._busy_until, self._num_deliveries, delivery))
            self._made.clear()
        while self._due and self._due[0][0] <= self._now:
            self.loop.inbox.append(heapq.heappop(self._due)[2])

    def _try_to_reopen(self) -> None:
        """Try once, after a pause."""
        self._port.skip(_RETRY_FRAMES)
        for _ in range(_RETRY_FRAMES):
            self._now += FRAME_SAMPLES
            self._think()
            self.loop.wait(FRAME_SAMPLES)
        with contextlib.suppress(DeviceLost):
            self._port.open()
            self.loop.restore()
