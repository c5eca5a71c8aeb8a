"""The end-of-turn bench: its parts are parts, its pauses are pauses, its shares add up."""

from __future__ import annotations

import random

import numpy as np

from deeptalk_edge.bench.end_of_turn import Verdict, broken_off, drawn_questions, report, with_pause

RATE_HZ = 16000


def test_running_speech_is_broken_off_where_it_is_quiet() -> None:
    word = np.full(RATE_HZ // 5, 0.5, np.float32)
    gap = np.zeros(RATE_HZ // 20, np.float32)
    speech = np.concatenate([word, gap] * 6)
    for seed in range(20):
        part = broken_off(speech, random.Random(seed))
        assert 0.2 * len(speech) < len(part) < 0.95 * len(speech)
        assert speech[len(part)] == 0


def test_a_pause_of_100_ms_follows_the_last_loud_sample() -> None:
    speech = np.concatenate([np.zeros(999), np.full(1600, 0.5), np.zeros(5000)])
    heard = with_pause(speech.astype(np.float32))
    assert len(heard) == 4800 + 1600 + 1600
    assert np.abs(heard[-1600:]).max() < 0.01 < np.abs(heard[-1601])


def test_every_intent_is_drawn_and_nothing_of_the_test_half() -> None:
    drawn = drawn_questions(40, random.Random(0))
    assert len({question.text for question in drawn}) == 40
    assert len({question.intent for question in drawn}) >= 9
    assert not any(question.is_test for question in drawn)


def test_the_table_gives_the_share_of_each_kind_that_a_rule_calls_complete() -> None:
    verdicts = [
        Verdict("some", "whole", 0.9, -0.5),
        Verdict("some", "whole", 0.5, -0.0001),
        Verdict("some", "broken", 0.5, -0.0001),
        *[Verdict("some", "broken", 0.1, -0.5)] * 3,
    ]
    rows = {line[:34].strip(): line[34:].split() for line in report(verdicts)}
    assert rows["some, called complete"] == ["whole", "2", "broken", "4"]
    assert rows["melody 0.6"] == ["50%", "0%"]
    assert rows["sure -0.0005"] == ["50%", "25%"]
    assert rows["as shipped"] == ["100%", "25%"]
    assert rows["melody_p that 5% of parts reach"] == ["50%"]
