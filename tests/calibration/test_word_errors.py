"""How many words are wrong."""

from __future__ import annotations

import pytest

from deeptalk_edge.calibration.word_errors import plain, spelled, word_errors


@pytest.mark.parametrize(
    ("wanted", "found", "errors"),
    [("abc", "abc", 0), ("abc", "ac", 1), ("ab", "axby", 2), ("", "a", 1), ("ab", "ac", 1)],
)
def test_word_errors_count_insertions_deletions_and_replacements(
    wanted: str, found: str, errors: int
) -> None:
    assert word_errors(list(wanted), list(found)) == errors


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert plain("Hello, I'm HERE!  5") == "hello i'm here 5"
    assert spelled("Hello, I'm HERE!  5") == "hello i'm here"


def test_texts_of_any_script_are_told_apart() -> None:
    assert plain("你好") != plain("再见")
    assert spelled("你好") == ""
