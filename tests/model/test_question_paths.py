"""The prefix tree gives the result of Viterbi over each question separately."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from deeptalk_edge.model.question_paths import QuestionPaths

WORDS = ("a", "b", "c", "d")
QUESTIONS = ("a b", "a b c", "a a d", "c", "d b a c")


def best_path(log_p: np.ndarray, said: tuple[str, ...]) -> float:
    """Log-probability of the likeliest alignment of these words with the frames."""
    labels = [0]
    for word in said:
        labels += [WORDS.index(word) + 1, 0]
    scores = {-1: 0.0}
    for frame in log_p:
        new: dict[int, float] = {}
        for at, score in scores.items():
            for to in (at, at + 1, at + 2):
                if to < 0 or to >= len(labels):
                    continue
                skips = to == at + 2
                if skips and (labels[to] == 0 or (at >= 0 and labels[to] == labels[at])):
                    continue
                if at == -1 and to > 1:
                    continue
                value = score + float(frame[labels[to]])
                new[to] = max(new.get(to, -1e9), value)
        scores = new
    ends = [scores.get(len(labels) - 1, -1e9), scores.get(len(labels) - 2, -1e9)]
    return max(ends)


def some_log_p(seed: int, frames: int = 12) -> np.ndarray:
    p = np.random.default_rng(seed).dirichlet(np.full(len(WORDS) + 1, 0.3), frames)
    return np.log(np.maximum(p, 1e-9)).astype(np.float32)


@pytest.mark.parametrize("seed", range(6))
def test_the_tree_finds_the_best_question_and_the_best_beginning(seed: int) -> None:
    log_p = some_log_p(seed)
    found = QuestionPaths(WORDS, QUESTIONS).scores(log_p)
    split = [tuple(question.split()) for question in QUESTIONS]
    each = [best_path(log_p, said) for said in split]
    begun = {said[:end] for said in split for end in range(1, len(said))} - set(split)
    assert found.whole == pytest.approx(max(each), rel=1e-5)
    assert found.question == int(np.argmax(each))
    assert found.begun == pytest.approx(max(best_path(log_p, said) for said in begun), rel=1e-5)
    assert found.free == pytest.approx(float(log_p.max(axis=1).sum()), rel=1e-5)


def test_frames_that_are_certainly_blank_do_not_change_the_order() -> None:
    paths = QuestionPaths(WORDS, QUESTIONS)
    log_p = some_log_p(1)
    blank = np.full((1, len(WORDS) + 1), -12.0, np.float32)
    blank[0, 0] = -1e-5
    longer = np.concatenate([np.repeat(blank, 40, axis=0), log_p, np.repeat(blank, 40, axis=0)])
    short, long = paths.scores(log_p), paths.scores(longer)
    assert long.whole - long.free == pytest.approx(short.whole - short.free, abs=1e-2)
    assert long.whole - long.begun == pytest.approx(short.whole - short.begun, abs=1e-2)


def test_beginnings_are_shared() -> None:
    said = [question.split() for question in QUESTIONS]
    prefixes = {tuple(words[:end]) for words in said for end in range(1, len(words) + 1)}
    assert QuestionPaths(WORDS, QUESTIONS).num_nodes == len(prefixes) + 1


def test_a_word_said_twice_needs_a_blank_between() -> None:
    certain = np.full((3, len(WORDS) + 1), -9.0, np.float32)
    certain[:, 1] = -0.1  # "a" in every frame
    twice, once = (QuestionPaths(WORDS, [text]).scores(certain).whole for text in ("a a", "a"))
    assert once == pytest.approx(-0.3, abs=1e-4)
    assert twice == pytest.approx(-9.2, abs=1e-4)


@pytest.mark.parametrize("questions", [[], ["a x"], [""]])
def test_questions_that_the_head_cannot_say_are_refused(questions: list[str]) -> None:
    with pytest.raises(ValueError, match="question"):
        QuestionPaths(WORDS, questions)


def test_the_search_has_an_answer_for_one_frame() -> None:
    for label in itertools.islice(range(len(WORDS) + 1), 5):
        log_p = np.full((1, len(WORDS) + 1), -5.0, np.float32)
        log_p[0, label] = -0.05
        assert np.isfinite(QuestionPaths(WORDS, QUESTIONS).scores(log_p).whole)
