"""The state machine takes every event, leaves states in bounded time, and plays no void attempt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.loop import signals
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.runtime.loop.signals import (
    AnswerFailed,
    AnswerHeard,
    Command,
    Frame,
    HangoverChosen,
    HangoverShortened,
    SoundBegan,
    SoundMissed,
    StopWordHeard,
)
from deeptalk_edge.runtime.loop.states import FRAME, Loop, State, step

SETTINGS = LoopSettings(
    max_utterance_ms=2000, thinking_ms=1000, speaking_ms=3000, recovering_ms=9000
)

_epochs = st.integers(0, 4)
_BY_WHO_SPEAKS = -1  # a stop word of the present voice
_events = st.one_of(
    st.booleans().map(Frame),
    st.booleans().map(Frame),
    st.booleans().map(Frame),
    st.sampled_from([160, 500, 1200]).map(HangoverChosen),
    st.sampled_from([160, 500]).map(HangoverShortened),
    st.builds(SoundBegan, _epochs, st.booleans()),
    st.just(StopWordHeard(_BY_WHO_SPEAKS)),
    st.just(SoundMissed(FRAME)),
    _epochs.map(AnswerHeard),
    _epochs.map(AnswerFailed),
    st.sampled_from([c for c in Command if c is not Command.STOP]),
)
# Long runs of one kind of frame reach states that single frames never reach.
_script = st.lists(st.tuples(_events, st.integers(1, 40)), max_size=60)


def as_of(loop: Loop, event: signals.Event) -> signals.Event:
    if event == StopWordHeard(_BY_WHO_SPEAKS):
        return StopWordHeard(loop.opened)
    return event


class Attempts:
    """Checks that the actions are consistent."""

    def __init__(self) -> None:
        self.begun: set[int] = set()
        self.committed: set[int] = set()
        self.over: set[int] = set()
        self.paused: set[int] = set()
        self.has_utterance = False

    def follow(self, actions: tuple[signals.Action, ...]) -> None:
        for action in actions:
            match action:
                case signals.UserStartedSpeaking():
                    self.has_utterance = True
                case signals.DropUtterance():
                    self.has_utterance = False
                case signals.BeginAnswer(epoch):
                    assert self.has_utterance
                    assert epoch not in self.begun
                    assert self.begun == self.over, "an attempt is still open"
                    self.begun.add(epoch)
                case signals.CommitAnswer(epoch):
                    self._open(epoch)
                    assert epoch not in self.committed
                    self.committed.add(epoch)
                case signals.DiscardAnswer(epoch):
                    self._open(epoch)
                    self.over.add(epoch)
                case signals.PausePlayback(epoch):
                    self._open(epoch)
                    assert epoch not in self.paused
                    self.paused.add(epoch)
                case signals.ResumePlayback(epoch):
                    self._open(epoch)
                    self.paused.remove(epoch)
                case signals.InterruptAnswer(epoch) | signals.FinishAnswer(epoch):
                    self._open(epoch)
                    assert epoch in self.committed
                    self.over.add(epoch)

    def _open(self, epoch: int) -> None:
        assert epoch in self.begun - self.over


@settings(max_examples=300, deadline=None)
@given(script=_script, push_to_talk=st.booleans())
def test_whatever_happens_attempts_are_begun_committed_and_ended_in_order(
    script: list[tuple[signals.Event, int]], push_to_talk: bool
) -> None:
    chosen = replace(SETTINGS, push_to_talk=push_to_talk)
    loop, now, attempts = Loop(), 0, Attempts()
    for event, times in script:
        for _ in range(times):
            now += FRAME
            epoch = loop.epoch
            loop, actions = step(loop, as_of(loop, event), now, chosen)
            attempts.follow(actions)
            assert loop.epoch >= epoch
            assert loop.is_answering == (attempts.begun != attempts.over)
            if loop.state in (State.SPEAKING, State.OVERLAP, State.THINKING):
                assert loop.epoch in attempts.committed
                assert loop.epoch not in attempts.paused
    loop, actions = step(loop, Command.STOP, now, chosen)
    attempts.follow(actions)
    assert attempts.begun == attempts.over
    assert loop.state is State.STOPPED


@settings(max_examples=300, deadline=None)
@given(script=_script, flicker=st.lists(st.booleans(), min_size=1, max_size=8))
def test_frames_alone_lead_out_of_every_state_in_bounded_time(
    script: list[tuple[signals.Event, int]], flicker: list[bool]
) -> None:
    loop, now = Loop(), 0
    for event, times in script:
        for _ in range(times):
            now += FRAME
            loop, _ = step(loop, as_of(loop, event), now, SETTINGS)
    longest = max(SETTINGS.recovering_ms, SETTINGS.overlap_ms + SETTINGS.resume_answer_ms)
    state, since, seen = loop.state, now, 0
    while loop.state is state and state not in (State.LISTENING, State.STOPPED):
        now += FRAME
        loop, _ = step(loop, Frame(flicker[seen % len(flicker)]), now, SETTINGS)
        seen += 1
        assert now - since <= (longest + 20) * 16


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("is_answering", [True, False])
def test_every_state_takes_every_event(state: State, is_answering: bool) -> None:
    events: list[signals.Event] = [
        Frame(True),
        Frame(False),
        HangoverChosen(200),
        HangoverShortened(200),
        StopWordHeard(0),
        SoundMissed(FRAME),
        SoundBegan(3),
        AnswerHeard(3),
        AnswerFailed(3),
        *Command,
    ]
    for event in events:
        for push_to_talk in (True, False):
            loop = Loop(state=state, epoch=3, is_answering=is_answering)
            chosen = replace(SETTINGS, push_to_talk=push_to_talk)
            after, _ = step(loop, event, FRAME, chosen)
            assert after.epoch in (3, 4)


@given(
    chosen_ms=st.sampled_from([200, 500, 1200]),
    cap_ms=st.integers(20, 1500),
    behind_ms=st.integers(5, 60).map(lambda frames: frames * 20),
)
def test_a_confident_answer_shortens_the_hangover_from_then_on(
    chosen_ms: int, cap_ms: int, behind_ms: int
) -> None:
    loop, now = Loop(state=State.USER_SPEAKING), 0
    while loop.state is not State.THINKING:
        now += FRAME
        loop, _ = step(loop, Frame(False), now, SETTINGS)
        if now == SETTINGS.speculate_ms * 16:
            loop, _ = step(loop, HangoverChosen(chosen_ms), now, SETTINGS)
        if now == behind_ms * 16:
            loop, _ = step(loop, HangoverShortened(cap_ms), now, SETTINGS)
    wanted_ms = max(min(cap_ms, chosen_ms), behind_ms + 20)
    assert 0 <= now // 16 - min(wanted_ms, chosen_ms) < 20


@pytest.mark.parametrize("event", [SoundBegan(2), AnswerHeard(2), AnswerFailed(2), SoundBegan(4)])
@pytest.mark.parametrize("state", list(State))
def test_events_of_another_epoch_change_nothing(state: State, event: signals.Event) -> None:
    loop = Loop(state=state, epoch=3, is_answering=True)
    assert step(loop, event, FRAME, SETTINGS) == (loop, ())


def test_a_voice_at_the_answers_end_is_kept_from_its_beginning() -> None:
    loop = Loop(state=State.OVERLAP, epoch=3, is_answering=True, opened=10 * FRAME)
    after, actions = step(loop, AnswerHeard(3), 14 * FRAME, SETTINGS)
    assert after.state is State.USER_SPEAKING
    assert signals.UserStartedSpeaking(9 * FRAME) in actions  # detectors wake a frame late


@pytest.mark.parametrize("state", list(State))
def test_a_stop_word_of_another_voice_changes_nothing(state: State) -> None:
    loop = Loop(state=state, epoch=3, is_answering=True, opened=5 * FRAME)
    assert step(loop, StopWordHeard(4 * FRAME), 6 * FRAME, SETTINGS) == (loop, ())


def test_a_silent_room_resets_the_conversation_once() -> None:
    settings = replace(SETTINGS, forget_ms=1000)
    loop, now = Loop(is_fresh=False), 16 * 1000
    assert step(loop, Frame(False), now - FRAME, settings)[1] == ()
    after, actions = step(loop, Frame(False), now, settings)
    assert actions == (signals.Reset(),)
    assert after.is_fresh
    assert step(after, Frame(False), now + FRAME, settings)[1] == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"start_ms": 10},
        {"forget_ms": 0},
        {"speculate_ms": 500},
        {"duck_ms": 300},
        {"confirm_ms": 500},
        {"duck_gain": 0.0},
        {"pre_roll_ms": -1},
        {"pre_roll_ms": 3000},
    ],
)
def test_invalid_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        LoopSettings(**wrong)  # type: ignore[arg-type]
