"""On a slow machine, late frames change no decision, and given-up questions have an event."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.runtime.audio.echo import NoCanceller
from deeptalk_edge.runtime.audio.end_of_turn import FixedHangover
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES, MicFrame
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort
from deeptalk_edge.runtime.events import (
    Interrupted,
    LiveEvent,
    Overloaded,
    SpeechEnded,
    SpeechStarted,
    TurnDone,
)
from deeptalk_edge.runtime.loop.clock import FrameClock
from deeptalk_edge.runtime.loop.fake_talker import FakeTalker
from deeptalk_edge.runtime.loop.model_worker import ModelWorker
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.runtime.loop.states import State
from deeptalk_edge.runtime.loop.voice_loop import VoiceLoop
from deeptalk_edge.trace import NO_TRACE
from tests.runtime.loop.scenes import LoudnessDetector, Stage

Array = NDArray[np.float32]
Spans = list[tuple[float, float]]

TICK_S = 0.02


class WaitingPort(VirtualPort):
    """A port whose frames come when they are due and wait until they are read."""

    def __init__(self, script: Spans) -> None:
        super().__init__(self._hear)
        self._script = script
        self._waiting: deque[MicFrame] = deque()

    def arrive(self) -> None:
        frame = super().read(0.0)
        assert frame is not None
        self._waiting.append(frame)

    def drop(self) -> None:
        """The oldest frame is lost."""
        self._waiting.popleft()

    def read(self, timeout_s: float) -> MicFrame | None:
        if not self._waiting:
            return None
        return self._waiting.popleft()._replace(num_waiting=len(self._waiting))

    def _hear(self, start: int) -> Array:
        middle_s = (start + FRAME_SAMPLES / 2) / 16000
        voiced = any(first <= middle_s < last for first, last in self._script)
        return np.full(FRAME_SAMPLES, 0.1 if voiced else 0.001, np.float32)


class LateStage:
    """A loop whose thread sometimes stalls, while microphone, loudspeaker and model go on."""

    def __init__(self, script: Spans) -> None:
        self.talker = FakeTalker(lambda turn: 60)  # 5.1 s
        self.port = WaitingPort(script)
        self.worker = ModelWorker(
            self.talker, lambda delivery: self.loop.inbox.append(delivery), trace=NO_TRACE
        )
        self.loop = VoiceLoop(
            self.worker,
            self.port,
            settings=LoopSettings(),
            max_question_samples=self.talker.max_question_samples,
            detector=LoudnessDetector(),
            canceller=NoCanceller(),
            end_of_turn=FixedHangover(500),
            spotter=None,
            clock=FrameClock(),
            emit=self._take,
            trace=NO_TRACE,
        )
        self.port.open()
        self.seen: list[tuple[str, int, int]] = []
        """Event, with start and end of the present voice."""
        self.given_up: list[Overloaded] = []

    def run(self, seconds: float, stalls: Spans = [], lost: Spans = []) -> None:  # noqa: B006
        """`stalls` are spans without reads; frames that come in `lost` are dropped."""
        busy_until_s = 0.0
        for tick in range(round(seconds / TICK_S)):
            now_s = tick * TICK_S
            self.port.arrive()
            if any(first <= now_s < last for first, last in lost):
                self.port.drop()
            busy_until_s = max(busy_until_s, now_s)
            while busy_until_s <= now_s and self.worker.work():
                busy_until_s += self.talker.step_ms() / 1000
            if any(first <= now_s < last for first, last in stalls):
                continue
            while frame := self.port.read(0.0):
                self.loop.push(frame)
            self.loop.serve()

    def _take(self, event: LiveEvent) -> None:
        loop = self.loop.loop
        if isinstance(event, Overloaded):
            self.given_up.append(event)
        if isinstance(event, (SpeechStarted, SpeechEnded)):
            self.seen.append((type(event).__name__, loop.opened, loop.last_voice))
        if isinstance(event, (Interrupted, TurnDone)):
            self.seen.append((type(event).__name__, 0, 0))


SCRIPT = [(1.0, 2.0), (4.5, 5.5), (8.5, 8.6), (14.0, 14.7), (14.9, 16.0), (24.0, 25.0)]


@pytest.mark.parametrize("seed", range(8))
def test_frames_that_come_late_in_bursts_change_no_decision(seed: int) -> None:
    on_time, late = LateStage(SCRIPT), LateStage(SCRIPT)
    on_time.run(34)
    rng = random.Random(seed)
    starts = [rng.uniform(0, 33) for _ in range(12)]
    late.run(34, [(start, start + rng.uniform(0.1, 0.9)) for start in starts])
    assert late.seen == on_time.seen
    assert [name for name, *_ in late.seen].count("SpeechEnded") == 4
    assert late.loop.num_overloaded == 0


def test_a_voice_from_before_the_sound_began_is_not_its_echo() -> None:
    stage = LateStage([(1.0, 2.0), (2.55, 3.15)])
    stage.run(6, [(2.4, 3.2)])  # the answer begins at 3.2; the second voice is read with it
    assert [name for name, *_ in stage.seen].count("Interrupted") == 1
    assert stage.talker.num_turns + (stage.loop.loop.state is State.SPEAKING) == 2


def test_the_cancellers_half_second_begins_with_the_sound_even_if_frames_are_read_late() -> None:
    stage = LateStage([(1.0, 2.0), (3.4, 3.76)])
    stage.run(6, [(2.3, 3.3)])  # the answer sounds from 3.3 s on
    assert "Interrupted" not in [name for name, *_ in stage.seen]


def test_a_question_with_lost_samples_is_given_up_and_the_next_is_answered() -> None:
    stage = LateStage([(1.0, 2.0), (5.0, 6.0)])
    stage.run(14, lost=[(1.4, 1.8)])
    (given,) = stage.given_up
    assert given.reason == "sound lost"
    assert given.seconds == pytest.approx(0.4)
    assert stage.loop.num_overloaded == 1
    (ended,) = [start for name, start, _ in stage.seen if name == "SpeechEnded"]
    assert ended == 5 * 16000
    assert stage.talker.num_turns == 1
    assert stage.talker.num_discarded == 0


def test_sound_lost_between_questions_affects_no_question() -> None:
    stage = LateStage([(1.0, 2.0), (9.0, 10.0)])
    stage.run(17, lost=[(0.2, 0.6), (8.0, 8.6)])
    assert stage.talker.num_turns == 2
    assert not stage.given_up


def test_a_much_later_question_is_asked_alone_and_the_earlier_one_is_given_up() -> None:
    slow = Stage((1.0, 2.0), (4.0, 5.0), step_ms=lambda: 200.0)
    slow.run_until(8.5)
    (given,) = slow.of(Overloaded)
    assert given.reason == "answer late"
    assert given.seconds == pytest.approx(2.06)
    assert slow.of(SpeechEnded)[-1].seconds == pytest.approx(1.0)
    assert slow.talker.num_discarded == 1


def test_a_user_who_soon_continues_asks_one_longer_question_even_with_a_slow_model() -> None:
    slow = Stage((1.0, 2.0), (3.4, 4.0), step_ms=lambda: 200.0)
    slow.run_until(8.5)
    assert not slow.of(Overloaded)
    assert slow.of(SpeechEnded)[-1].seconds == pytest.approx(3.0)


def test_an_answer_that_never_comes_is_given_up_with_an_event() -> None:
    settings = LoopSettings(thinking_ms=2000)
    stuck = Stage((1.0, 2.0), settings=settings, step_ms=lambda: 900.0)
    stuck.run_until(6)
    (given,) = stuck.of(Overloaded)
    assert given.reason == "answer late"
    assert given.seconds == pytest.approx(2.5)
    assert stuck.state() is State.LISTENING
    assert stuck.talker.history == []
