"""The independent recogniser: which words it knows, and how many are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from deeptalk_edge.calibration.recogniser import WordRecogniser, word_errors


def test_it_hears_no_word_in_silence_and_refuses_a_vocabulary_without_a_known_word() -> None:
    pytest.importorskip("pocketsphinx")
    hear = WordRecogniser(["Hello, qqxzw!"], 24000)
    assert hear(np.zeros(24000, np.float32)) == []
    with pytest.raises(ValueError, match="knows none"):
        WordRecogniser(["qqxzw"], 24000)


@pytest.mark.parametrize(
    ("wanted", "found", "errors"),
    [("abc", "abc", 0), ("abc", "ac", 1), ("ab", "axby", 2), ("", "a", 1), ("ab", "ac", 1)],
)
def test_word_errors_count_insertions_deletions_and_replacements(
    wanted: str, found: str, errors: int
) -> None:
    assert word_errors(list(wanted), list(found)) == errors


def test_a_recogniser_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deeptalk_edge.calibration.recogniser.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        WordRecogniser(["hello"], 24000)
