"""The kiosk's questions: every one has an answer, and held-out ones are never in training."""

from __future__ import annotations

import random
import re

from deeptalk_edge.training.tiny.domain import (
    ANSWER_PATTERNS,
    COMBINATION_INTENTS,
    Question,
    answer_grammar,
    answers,
    answers_never_trained,
    questions,
    random_answer,
    random_words,
    vocabulary,
)


def test_the_domain_has_the_size_in_the_model_card() -> None:
    assert (len(questions()), len(answers()), len(vocabulary())) == (1612, 1223, 169)


def test_a_question_has_one_answer() -> None:
    answer_of: dict[str, str] = {}
    for question in questions():
        assert answer_of.setdefault(question.text, question.answer) == question.answer


def test_every_answer_fits_a_pattern() -> None:
    patterns = [re.compile(_as_expression(pattern)) for pattern in ANSWER_PATTERNS]
    for answer in answers():
        assert any(pattern.fullmatch(f" {answer}") for pattern in patterns), answer


def test_the_grammar_spells_out_every_pattern() -> None:
    grammar = answer_grammar()
    assert "calling room (zero | one | two" in grammar
    assert "[fifteen | thirty | forty five] from platform" in grammar
    words = set(re.findall(r"[a-z']+", grammar.partition("=")[2]))
    assert words >= {word for answer in answers() for word in answer.split()}


def test_a_held_out_combination_is_held_out_in_every_phrasing() -> None:
    by_combination: dict[tuple[str, str], set[bool]] = {}
    for question in questions():
        if question.intent in COMBINATION_INTENTS:
            key = (question.intent, question.key)
            by_combination.setdefault(key, set()).add(question.is_held_out)
    assert all(len(held_out) == 1 for held_out in by_combination.values())


def test_about_a_sixth_is_held_out_and_half_of_that_is_for_the_test() -> None:
    held_out = [question for question in questions() if question.is_held_out]
    assert 0.12 < len(held_out) / len(questions()) < 0.2
    assert 0.4 < sum(question.is_test for question in held_out) / len(held_out) < 0.6


def test_validation_and_test_share_no_combination() -> None:
    validation, test = (
        {
            (question.intent, question.key)
            for question in questions()
            if question.intent in COMBINATION_INTENTS
            and question.is_held_out
            and question.is_test is is_test
        }
        for is_test in (False, True)
    )
    assert validation
    assert test
    assert not validation & test


def test_a_fixed_phrase_is_never_held_out() -> None:
    question = Question(intent="fixed", key="hello", text="hello", answer="hello")
    assert not question.is_held_out


def test_no_training_question_has_an_answer_that_was_never_trained() -> None:
    never = answers_never_trained()
    assert len(never) == 177
    assert not never & {q.answer for q in questions() if not q.is_held_out}


def test_random_answers_are_repeatable_and_fit_a_pattern() -> None:
    texts = [random_answer(random.Random(seed)) for seed in range(200)]
    assert texts == [random_answer(random.Random(seed)) for seed in range(200)]
    patterns = [re.compile(_as_expression(pattern)) for pattern in ANSWER_PATTERNS]
    for text in texts:
        assert any(pattern.fullmatch(f" {text}") for pattern in patterns), text


def test_random_words_come_from_the_list_alone() -> None:
    words = ["gate", "oslo"]
    for seed in range(20):
        drawn = random_words(random.Random(seed), words).split()
        assert 3 <= len(drawn) <= 9
        assert set(drawn) <= set(words)


def _as_expression(pattern: tuple[str | tuple[str, ...], ...]) -> str:
    """The pattern as a regular expression; every part includes the space before it."""
    parts = [(part,) if isinstance(part, str) else part for part in pattern]
    spaced = ["|".join(f" {filling}" if filling else "" for filling in part) for part in parts]
    return "".join(f"({part})" for part in spaced)
