"""Confidence intervals of an evaluation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deeptalk_edge.model.rows import Ids
from deeptalk_edge.training import evaluate
from deeptalk_edge.training.answering import Samples
from deeptalk_edge.training.evaluate import Scores, hear_answers, score_answers, wilson


def test_an_interval_is_that_of_wilson() -> None:
    """By hand: 9 of 10 is 0.596 to 0.982."""
    rate = wilson(9, 10)
    assert (rate.low, rate.high) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson(10, 10).high == pytest.approx(1.0)
    assert str(wilson(0, 2)).startswith("0.000 (0.000 to"), "rounding makes it no -0.000"


def test_no_questions_give_no_rate() -> None:
    assert math.isnan(wilson(0, 0).share)


def test_the_language_drop_is_in_perplexity() -> None:
    scores = Scores(
        spoken=None,
        typed=None,
        codebook_accuracy=(),
        language_loss=1.1,
        base_language_loss=1.0,
    )
    assert scores.language_drop == pytest.approx(math.exp(0.1) - 1)
    assert "spoken questions: none" in scores.text()
    assert "+10.5%" in scores.text()


def test_equal_answers_are_heard_once_and_each_gets_its_own_words() -> None:
    decoded = []

    def sound_of(frames: Ids) -> Samples:
        decoded.append(int(frames.sum()))
        return np.full(3, frames.sum(), np.float32)

    answers = [np.full((2, 7), code) for code in (1, 2, 1)]
    recognisers = (lambda sound: f"a {sound[0]:.0f}", lambda sound: f"b {sound[0]:.0f}")
    heard = hear_answers(answers, sound_of, recognisers)
    assert heard == [("a 14", "b 14"), ("a 28", "b 28"), ("a 14", "b 14")]
    assert decoded == [14, 28]


@pytest.mark.parametrize(
    ("wanted", "said", "text_exact", "spoken_n"),
    [
        (["你好", "再见"], ["你好", "你好"], 0.5, None),
        (["你好", "gate one"], ["你好", "gate one"], 1.0, 1),
    ],
)
def test_text_is_compared_in_any_script_and_only_english_is_heard(
    wanted: list[str],
    said: list[str],
    text_exact: float,
    spoken_n: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pocketsphinx")
    questions = [("name", SimpleNamespace(answer=answer)) for answer in wanted]
    monkeypatch.setattr(evaluate, "questions_of", lambda *_: questions)
    silence = np.zeros(24000, np.float32)
    answers = [SimpleNamespace(text=text, frames=np.zeros((1, 7), np.int64)) for text in said]
    answerer: Any = SimpleNamespace(
        answers=lambda _: answers,
        sound_of=lambda _: silence,
        codec=SimpleNamespace(spec=SimpleNamespace(sampling_rate=24000)),
    )
    reader: Any = None
    scores = score_answers(answerer, reader, "TQAA", 2)
    assert scores is not None
    assert scores.text_exact.share == text_exact
    assert (scores.spoken_exact.n if scores.spoken_exact else None) == spoken_n
    assert scores.spoken_word_error_rate == (1.0 if spoken_n else None)
