"""The rows before the first question are fed while idle, and that changes no answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import BackendError, ExpertUnavailable
from deeptalk_edge.model.prompt import Heard
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.events import Interrupted, TurnDone
from deeptalk_edge.runtime.loop.settings import LoopSettings
from tests.runtime.loop.scenes import Stage
from tests.runtime.sounds import voice
from tests.runtime.test_conversation import opening, take, talk

Answers = list[tuple[str, NDArray[np.float32]]]

ROWS = {"system": "Be brief.", "max_rows": 40}
QUESTIONS: dict[str, Any] = {"typed": "Why?", "heard": voice(0.6)}


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of every prefill."""
    lengths: list[int] = []
    prefill = OrtEngine.prefill

    def spy(self: OrtEngine, rows: Any, features: Any, audio_mask: Any) -> None:
        lengths.append(len(rows))
        prefill(self, rows, features, audio_mask)

    monkeypatch.setattr(OrtEngine, "prefill", spy)
    return lengths


def opening_rows(conversation: Conversation) -> int:
    return int(opening(conversation, Heard(num_frames=1)).audio_mask.argmax())


@pytest.mark.parametrize("is_idle", [True, False], ids=["while idle", "with the question"])
def test_with_time_before_the_first_spoken_question_only_its_rows_are_fed(
    bundle: Bundle, fed: list[int], is_idle: bool
) -> None:
    with talk(bundle, **ROWS) as conversation:
        fed.clear()  # rows of the golden check
        num_opening = opening_rows(conversation)
        assert num_opening > len("Be brief.")  # the test's tokenizer gives bytes
        if is_idle:
            conversation.idle()
            assert fed == [num_opening]
            fed.clear()
        whole = len(conversation.history.segment(Heard(num_frames=31)).rows)
        metrics = take(conversation.ask(voice(0.6)))[2].metrics
        question = whole - num_opening
        assert fed == ([] if is_idle else [num_opening]) + [question - 1]
        assert metrics.num_prompt_rows == (question if is_idle else whole)


@pytest.mark.parametrize("kinds", list(itertools.product(QUESTIONS, QUESTIONS)), ids="-".join)
def test_no_answer_depends_on_when_the_opening_was_fed(
    bundle: Bundle, kinds: tuple[str, str]
) -> None:
    def answers(*, is_idle: bool) -> Answers:
        with talk(bundle, **ROWS) as conversation:
            said = []
            for question in (QUESTIONS[kind] for kind in kinds):
                if is_idle:
                    conversation.idle()
                    answer = conversation.begin(question)
                    answer.advance()
                    answer.advance()
                    answer.discard()
                    conversation.idle()
                said.append(take(conversation.ask(question))[:2])
            return said

    for (text, pcm), (idle_text, idle_pcm) in zip(
        answers(is_idle=False), answers(is_idle=True), strict=True
    ):
        assert text == idle_text
        np.testing.assert_array_equal(pcm, idle_pcm)


def test_an_opening_that_failed_is_fed_again(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with talk(bundle, **ROWS) as conversation:
        run = OrtEngine._run_layers

        def break_down(self: OrtEngine, *args: Any) -> None:
            run(self, *args)
            raise BackendError("segment_01.onnx: failed to run")

        monkeypatch.setattr(OrtEngine, "_run_layers", break_down)
        with pytest.raises(BackendError):
            conversation.idle()
        monkeypatch.undo()
        assert conversation.engine.num_rows == 0
        conversation.idle()
        assert conversation.engine.num_rows == opening_rows(conversation)


def test_the_loop_feeds_the_opening_at_the_start_and_after_a_reset() -> None:
    stage = Stage((1.0, 2.0), settings=LoopSettings(forget_ms=3000))
    done: list[tuple[str, int]] = []

    def note(name: str) -> Any:
        return lambda: done.append((name, round(stage.simulation.seconds)))

    stage.talker.idle = note("opening")  # type: ignore[method-assign]
    stage.talker.reset = note("reset")  # type: ignore[method-assign]
    stage.run_until(9)
    assert done == [("opening", 0), ("opening", 5), ("reset", 8), ("opening", 8)]


def test_old_turns_are_dropped_when_a_turn_ends_even_if_the_user_speaks_already() -> None:
    stage = Stage((1.0, 2.0), (4.0, 6.0))  # the second question overlaps the answer
    done: list[str] = []

    def note(name: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            done.append(name)
            return act(*args)

        return noted

    stage.talker.begin = note("begin", stage.talker.begin)  # type: ignore[method-assign]
    stage.talker.trim_history = note("trim", stage.talker.trim_history)  # type: ignore[method-assign]
    stage.talker.idle = lambda: 0  # type: ignore[method-assign]
    stage.run_until(12)
    assert len(stage.of(Interrupted)) == 1
    assert done == ["begin", "trim", "begin", "trim"]


def test_an_opening_that_fails_while_idle_does_not_end_the_conversation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = Stage((1.0, 2.0))

    def fail() -> int:
        raise ExpertUnavailable("experts.bin: layer 1, expert 3: Input/output error")

    stage.talker.idle = fail  # type: ignore[method-assign]
    stage.run_until(9)
    assert len(stage.of(TurnDone)) == 1
    assert "expert 3: Input/output error" in caplog.text
