"""Confidence intervals of an evaluation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deeptalk_edge.model.rows import Ids
from deeptalk_edge.training.answering import Samples
from deeptalk_edge.training.evaluate import Scores, hear_answers, wilson


def test_an_interval_is_that_of_wilson() -> None:
    """By hand: 9 of 10 is 0.596 to 0.982."""
    rate = wilson(9, 10)
    assert (rate.low, rate.high) == pytest.approx((0.5958, 0.9821), abs=1e-4)
    assert wilson(10, 10).high == pytest.approx(1.0)
    assert wilson(0, 10).low == pytest.approx(0.0)


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
