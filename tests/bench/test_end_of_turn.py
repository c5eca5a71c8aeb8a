"""The end-of-turn bench: its parts are parts, its pauses are pauses, its shares add up."""

from __future__ import annotations

import random

import numpy as np

from deeptalk_edge.bench.end_of_turn import drawn_questions, pause_ms, report, with_pause
from deeptalk_edge.bench.turn_rules import Pause

RATE_HZ = 16000


def test_a_pause_of_100_ms_follows_the_last_loud_sample() -> None:
    speech = np.concatenate([np.zeros(999), np.full(1600, 0.5), np.zeros(5000)])
    heard = with_pause(speech.astype(np.float32))
    assert len(heard) == 4800 + 1600 + 1600
    assert np.abs(heard[-1600:]).max() < 0.01 < np.abs(heard[-1601])


def test_every_intent_is_drawn_and_no_question_of_the_test_half() -> None:
    drawn = drawn_questions(40, random.Random(0))
    assert len({question.text for question in drawn}) == 40
    assert len({question.intent for question in drawn}) >= 9
    assert not any(question.is_test for question in drawn)


def test_pauses_inside_questions_last_200_ms_or_more() -> None:
    rng = random.Random(0)
    drawn = np.array([pause_ms(rng) for _ in range(2000)])
    assert drawn.min() == 200
    assert 420 < np.median(drawn) < 480


def verdict(kind: str, number: int, whole_p: float) -> Pause:
    cues = {"melody": 0.5, "log p": -1.0, "whole": whole_p}
    return Pause(
        set_name="some",
        kind=kind,
        number=number,
        lasts_ms=None if kind == "whole" else 400.0,
        cues=cues,
        known_ms=dict.fromkeys(cues, 150.0),
        is_whole=whole_p >= 0.5,
    )


def test_the_tables_give_shares_of_each_kind_and_the_wait_of_each_rule() -> None:
    pauses = [
        *[verdict("whole", i, 0.9) for i in range(4)],
        *[verdict("broken", i, 0.1) for i in range(3)],
        verdict("broken", 3, 0.6),
    ]
    rows = {line[:34].strip(): line[34:].split() for line in report(pauses)}
    assert rows["some, called complete"] == ["whole", "4", "broken", "4"]
    assert rows["the bundle's own score"] == ["100%", "25%"]
    assert rows["as shipped"] in (["100%", "25%"], ["200", "200", "200", "25.0%"])
    assert rows["whole that 5% of parts reach"] == ["100%"]
    assert rows["melody that 5% of parts reach"] == ["0%"]
    assert rows["voice detector alone, 5%"] == ["400", "400", "400", "0.0%"]
    assert rows["whole, 5%"] == ["200", "200", "200", "0.0%"]
