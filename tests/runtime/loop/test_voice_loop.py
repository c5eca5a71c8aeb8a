"""Conversations by voice on a virtual clock: events, sound and history."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.errors import BackendError
from deeptalk_edge.runtime.events import (
    AnswerResumed,
    AudioChunk,
    Interrupted,
    NothingSaid,
    Pieces,
    SoundLost,
    SoundRestored,
    SpeechEnded,
    SpeechStarted,
    TextPiece,
    TurnDone,
    TurnFailed,
)
from deeptalk_edge.runtime.loop.fake_talker import FRAME_SAMPLES, FakeAnswer, level_of
from deeptalk_edge.runtime.loop.model_worker import Made, Written
from deeptalk_edge.runtime.loop.settings import LoopSettings, ReplyPolicy
from deeptalk_edge.runtime.loop.signals import Command
from deeptalk_edge.runtime.loop.states import State
from tests.runtime.loop.scenes import Stage


def test_a_question_is_answered_and_the_answer_heard_to_its_end() -> None:
    stage = Stage((1.0, 2.0))
    stage.run_until(6)
    (done,) = stage.of(TurnDone)
    assert done.text == "0.0 0.1 0.2 0.3 0.4 0.5"
    assert "".join(piece.text for piece in stage.of(TextPiece)).strip() == done.text
    assert sum(chunk.pcm.size for chunk in stage.of(AudioChunk)) == 24 * FRAME_SAMPLES
    played = np.concatenate(stage.played)
    assert np.count_nonzero(played) == 24 * FRAME_SAMPLES
    assert stage.talker.history == [done.text]
    assert stage.state() is State.LISTENING
    assert stage.when(SpeechStarted) == pytest.approx([1.06])
    assert stage.of(SpeechEnded)[0].seconds == pytest.approx(1.0)


@pytest.mark.parametrize("device_ms", [0, 40, 80])
def test_no_question_opens_while_the_device_still_plays_the_answers_end(device_ms: int) -> None:
    stage = Stage((1.0, 2.0), device_ms=device_ms)
    stage.run_until(4)
    while stage.state() is State.SPEAKING:
        stage.run_until(stage.simulation.seconds + 0.02)
    assert stage.state() is State.LISTENING
    last_block = int(np.flatnonzero([block.any() for block in stage.played])[-1])
    blocks_since = len(stage.played) - 1 - last_block
    assert blocks_since == device_ms // 20


@pytest.mark.parametrize(("is_speculating", "queued_ms"), [(True, 500), (False, 640)])
def test_speculation_hides_the_models_time_in_the_hangover(
    is_speculating: bool, queued_ms: float
) -> None:
    stage = Stage((1.0, 2.0), settings=LoopSettings(is_speculating=is_speculating))
    stage.run_until(6)
    voice = stage.of(TurnDone)[0].voice
    assert voice.hangover_ms == 500
    assert voice.was_speculative is is_speculating
    # Simulated: 30 + 20 + 10 * 8 ms of model, seen with the next frame.
    assert voice.queued_ms == pytest.approx(queued_ms, abs=20)
    assert voice.audible_ms == pytest.approx(voice.queued_ms + 40, abs=20)


def test_speech_after_a_pause_discards_the_speculative_answer_and_asks_one_utterance() -> None:
    stage = Stage((1.0, 1.6), (1.9, 2.5))
    stage.run_until(6)
    (done,) = stage.of(TurnDone)
    assert done.voice.num_discarded == 1
    assert stage.talker.num_discarded == 1
    assert stage.of(SpeechEnded)[0].seconds == pytest.approx(1.5)
    assert len(stage.of(SpeechStarted)) == 1


@pytest.mark.parametrize("start_s", [1.0, 40.0])
def test_a_user_who_continues_before_the_answer_sounds_asks_one_longer_question(
    start_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    settings = LoopSettings(is_speculating=False, hangover_ms=120)
    stage = Stage((start_s, start_s + 0.6), (start_s + 0.76, start_s + 1.3), settings=settings)
    stage.run_until(start_s + 5)
    assert not caplog.records  # no warning of speech without a pause
    (done,) = stage.of(TurnDone)
    assert stage.talker.num_discarded == 1
    assert stage.of(SpeechEnded)[-1].seconds == pytest.approx(1.3)
    assert stage.talker.history == [done.text]


def test_a_barge_in_stops_the_sound_and_keeps_what_was_heard() -> None:
    stage = Stage((1.0, 2.0), (3.5, 4.5))
    stage.run_until(9)
    (interrupted,) = stage.of(Interrupted)
    assert stage.when(Interrupted)[0] == pytest.approx(3.76)
    cut, second = stage.of(TurnDone)
    assert cut.text == stage.talker.history[0]
    assert cut.voice.stop_ms == pytest.approx(260 + 40)
    heard_samples = np.count_nonzero(np.concatenate(stage.played) == level_of(0))
    assert len(cut.text.split()) == int(interrupted.heard_s * 24000) // FRAME_SAMPLES // 4
    assert 0 < len(cut.text.split()) < 6
    assert heard_samples < 24 * FRAME_SAMPLES
    assert not stage.played_between(3.80, 5.0).any()
    assert second.text.startswith("1.0")
    assert len(second.text.split()) == 6


def test_the_answer_is_quieter_before_it_stops() -> None:
    stage = Stage((1.0, 2.0), (3.5, 4.5))
    stage.run_until(9)
    before, after = stage.played_between(3.4, 3.5), stage.played_between(3.66, 3.74)
    np.testing.assert_allclose(before, level_of(0))
    np.testing.assert_allclose(after, level_of(0) * 0.25)


def test_the_model_stops_within_one_step_of_a_barge_in() -> None:
    # A row of 85 ms takes 80 ms, so the model always computes.
    stage = Stage((1.0, 2.0), (4.5, 7.0), num_frames=lambda turn: 200, step_ms=lambda: 80.0)
    stage.run_until(4.74)
    before = stage.talker.num_steps
    stage.run_until(6.9)
    assert stage.when(Interrupted) == pytest.approx([4.76])
    assert stage.state() is State.USER_SPEAKING
    assert stage.talker.num_steps - before <= 1


def test_late_deliveries_of_a_void_attempt_are_never_played() -> None:
    stage = Stage((1.0, 2.0))
    for second in (2.2, 2.55, 3.0):  # speculative, committed, speaking
        stage.run_until(second)
        late = (TextPiece("stale"), AudioChunk(np.full(4800, 0.9, np.float32)))
        stage.loop.inbox.append(Made(stage.loop.loop.epoch - 1, late))
        stage.loop.inbox.append(Written(stage.loop.loop.epoch - 1))
    stage.run_until(6)
    assert not any(piece.text == "stale" for piece in stage.of(TextPiece))
    assert np.concatenate(stage.played).max() <= level_of(0)
    assert stage.of(TurnDone)[0].text == "0.0 0.1 0.2 0.3 0.4 0.5"


def test_the_answer_resumes_over_voice_that_stays_undecided() -> None:
    stage = Stage((1.0, 2.0), (3.0, 3.1), settings=LoopSettings(release_ms=60_000, overlap_ms=500))
    stage.run_until(3.2)
    assert stage.state() is State.OVERLAP
    stage.run_until(3.7)
    assert stage.state() is State.SPEAKING
    np.testing.assert_allclose(stage.played_between(3.64, 3.7), level_of(0))


@pytest.mark.parametrize("length_s", [0.1, 0.2, 0.24])
def test_a_back_channel_only_makes_the_answer_quieter(length_s: float) -> None:
    stage = Stage((1.0, 2.0), (3.5, 3.5 + length_s))
    stage.run_until(7)
    assert not stage.of(Interrupted)
    assert len(stage.of(TurnDone)) == 1
    assert np.count_nonzero(np.concatenate(stage.played)) == 24 * FRAME_SAMPLES
    np.testing.assert_allclose(stage.played_between(3.9, 4.0), level_of(0))


@pytest.mark.parametrize(("warm_up_ms", "is_ducked"), [(500, False), (20, True)])
def test_echo_that_is_not_cancelled_yet_does_not_make_the_answer_quieter(
    warm_up_ms: int, is_ducked: bool
) -> None:
    stage = Stage((1.0, 2.0), (2.6, 2.84), settings=LoopSettings(warm_up_ms=warm_up_ms))
    stage.run_until(7)  # the answer sounds from 2.5 s on
    played = stage.played_between(2.6, 3.2)
    assert bool(played.min() < level_of(0)) is is_ducked


@pytest.mark.parametrize(
    ("voice_s", "ends"), [(0.35, "heard"), (0.39, "heard"), (1.5, "stopped at 3.02")]
)
def test_voice_does_not_stop_an_answer_before_the_echo_canceller_has_adapted(
    voice_s: float, ends: str
) -> None:
    stage = Stage((1.0, 2.0), (2.6, 2.6 + voice_s))
    stage.run_until(7)
    stops = [f"stopped at {second:.2f}" for second in stage.when(Interrupted)]
    assert (stops or ["heard"]) == [ends]


def test_after_a_false_alarm_the_answer_resumes_where_it_stopped() -> None:
    stage = Stage((1.0, 2.0), (3.5, 3.84))
    stage.run_until(9)
    assert len(stage.of(Interrupted)) == len(stage.of(AnswerResumed)) == 1
    assert stage.when(AnswerResumed) == pytest.approx([3.84 + 1.5])
    (done,) = stage.of(TurnDone)
    assert done.text == "0.0 0.1 0.2 0.3 0.4 0.5"
    assert done.voice.stop_ms is None
    played = np.count_nonzero(np.concatenate(stage.played))
    assert played == 24 * FRAME_SAMPLES - 1  # a fade ends with 0


def test_a_user_who_speaks_on_after_a_false_alarm_is_answered() -> None:
    stage = Stage((1.0, 2.0), (3.5, 3.84), (4.4, 5.2))
    stage.run_until(9)
    assert not stage.of(AnswerResumed)
    cut, second = stage.of(TurnDone)
    assert len(cut.text.split()) < 6
    assert second.text.startswith("1.0")


def test_an_uninterruptible_answer_is_not_interrupted() -> None:
    stage = Stage((1.0, 2.0), (3.5, 4.2))
    stage.loop.loudspeaker.policy = ReplyPolicy(interruptible=False)
    stage.run_until(7)
    assert not stage.of(Interrupted)
    (done,) = stage.of(TurnDone)
    assert done.text == "0.0 0.1 0.2 0.3 0.4 0.5"


def test_an_answer_that_counts_in_full_stays_whole_in_the_history() -> None:
    stage = Stage((1.0, 2.0), (3.5, 4.5))
    stage.loop.loudspeaker.policy = ReplyPolicy(commit="full")
    stage.run_until(4.4)
    (cut,) = stage.of(TurnDone)
    assert cut.text == "0.0 0.1 0.2 0.3 0.4 0.5"
    assert cut.voice.heard_s < 1.5


def test_a_lost_device_cuts_the_answer_where_it_was_heard_and_comes_back() -> None:
    stage = Stage((1.0, 2.0), (9.0, 10.0))
    stage.run_until(3.5)
    stage.port.lose()
    stage.run_until(5.0)
    assert stage.state() is State.RECOVERING
    (cut,) = stage.of(TurnDone)
    assert 0 < len(cut.text.split()) < 6
    stage.port.restore()
    stage.run_until(15)
    assert len(stage.of(SoundLost)) == len(stage.of(SoundRestored)) == 1
    assert stage.of(TurnDone)[1].text == "1.0 1.1 1.2 1.3 1.4 1.5"
    assert stage.when(SpeechStarted)[1] == pytest.approx(9.06)
    assert stage.loop.loop.since > 10 * 16000  # the loop's clock goes on


def test_push_to_talk_asks_the_sound_between_press_and_release() -> None:
    stage = Stage((1.0, 2.0), (3.0, 3.4), settings=LoopSettings(push_to_talk=True))
    stage.run_until(2.5)
    assert not stage.of(SpeechStarted)
    stage.loop.tell(Command.PRESS)
    stage.run_until(3.5)
    stage.loop.tell(Command.RELEASE)
    stage.run_until(4.5)
    assert not stage.of(TurnDone)
    stage.loop.tell(Command.PRESS)
    stage.run_until(5.0)
    assert stage.state() is State.USER_SPEAKING
    assert len(stage.of(TurnDone)) == 1


@pytest.mark.parametrize(
    "script", [(), ((1.5, 1.54),), ((0.5, 0.9), (2.1, 2.5))], ids=["silence", "a click", "outside"]
)
def test_push_to_talk_without_speech_asks_nothing(script: tuple[tuple[float, float], ...]) -> None:
    stage = Stage(*script, settings=LoopSettings(push_to_talk=True))
    for second, command in ((1.0, Command.PRESS), (2.0, Command.RELEASE)):
        stage.run_until(second)
        stage.loop.tell(command)
    stage.run_until(4.0)
    assert stage.state() is State.LISTENING
    assert len(stage.of(NothingSaid)) == 1
    assert not stage.of(SpeechEnded)
    assert not stage.talker.num_steps


def test_a_press_in_silence_asks_nothing_after_one_with_a_question() -> None:
    stage = Stage((1.2, 1.8), settings=LoopSettings(push_to_talk=True))
    presses = {1.0: Command.PRESS, 2.0: Command.RELEASE, 6.0: Command.PRESS, 7.0: Command.RELEASE}
    for second, command in presses.items():
        stage.run_until(second)
        stage.loop.tell(command)
    stage.run_until(8.0)
    assert len(stage.of(TurnDone)) == len(stage.of(NothingSaid)) == 1
    assert stage.talker.num_turns == 1


def test_a_button_that_is_stuck_in_silence_asks_nothing() -> None:
    settings = LoopSettings(push_to_talk=True, max_utterance_ms=2000)
    stage = Stage((4.0, 5.0), settings=settings)
    stage.loop.tell(Command.PRESS)
    stage.run_until(3.0)
    assert stage.state() is State.LISTENING
    assert not stage.talker.num_steps
    stage.loop.tell(Command.PRESS)
    stage.run_until(5.5)
    assert stage.of(SpeechEnded)[0].seconds == pytest.approx(1.0)


def test_push_to_talk_measures_from_the_last_voice_not_from_the_button() -> None:
    stage = Stage((1.5, 2.5), settings=LoopSettings(push_to_talk=True))
    for second, command in ((1.0, Command.PRESS), (3.0, Command.RELEASE)):
        stage.run_until(second)
        stage.loop.tell(command)
    stage.run_until(6.0)
    assert stage.of(SpeechEnded)[0].seconds == pytest.approx(1.0)
    voice = stage.of(TurnDone)[0].voice
    assert voice.hangover_ms == pytest.approx(500, abs=20)


def test_an_integrator_can_interrupt() -> None:
    stage = Stage((1.0, 2.0))
    stage.run_until(3.5)
    stage.loop.tell(Command.INTERRUPT)
    stage.run_until(3.6)
    assert stage.state() is State.LISTENING
    assert not stage.played_between(3.54, 3.6).any()
    assert len(stage.of(TurnDone)) == 1


def test_a_silent_room_begins_a_new_conversation_once() -> None:
    stage = Stage((1.0, 2.0), settings=LoopSettings(forget_ms=3000))
    stage.run_until(7)
    assert stage.talker.history == ["0.0 0.1 0.2 0.3 0.4 0.5"]
    stage.run_until(9)
    assert stage.talker.history == []


def test_an_endless_utterance_is_answered_at_the_longest_question() -> None:
    stage = Stage((1.0, 60.0), settings=LoopSettings(max_utterance_ms=5000))
    stage.run_until(6.3)
    assert stage.of(SpeechEnded)[0].seconds == pytest.approx(5.0)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_a_failed_answer_gives_an_event_and_the_next_question_is_answered(
    num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage((1.0, 2.0), (6.0, 7.0), settings=LoopSettings(is_speculating=False))
    begin = stage.talker.begin

    def broken_once(question: NDArray[np.float32]) -> FakeAnswer:
        monkeypatch.undo()
        answer = begin(question)
        steps = answer._steps

        def breaking() -> Generator[Pieces, None, None]:
            for _ in range(11 + num_rows):
                yield next(steps)
            raise BackendError("head.onnx: failed to run")

        answer._steps = breaking()
        return answer

    monkeypatch.setattr(stage.talker, "begin", broken_once)
    stage.run_until(12)
    (failed,) = stage.of(TurnFailed)
    assert "head.onnx" in str(failed.error)
    assert stage.of(TurnDone)[-1].text.endswith(".5")
    assert len(stage.of(TurnDone)) == 1 + (num_rows > 0)  # the heard part is in the history


def test_an_utterance_is_no_longer_than_the_encoder_hears_at_a_time() -> None:
    stage = Stage((1.0, 60.0))
    asked: list[int] = []
    begin = stage.talker.begin

    def note(question: NDArray[np.float32]) -> FakeAnswer:
        asked.append(len(question))
        return begin(question)

    stage.talker.begin = note  # type: ignore[assignment, method-assign]
    stage.run_until(35)
    assert asked == [stage.talker.max_question_samples - 100 * 16]  # the whole question is voice


def test_no_answer_begins_after_stop() -> None:
    stage = Stage((1.0, 2.0), (4.0, 5.0))
    stage.run_until(3.0)
    stage.loop.tell(Command.STOP)
    stage.run_until(9)
    assert stage.loop.is_stopped
    assert stage.simulation.seconds < 3.1
