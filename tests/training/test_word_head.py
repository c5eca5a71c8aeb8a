"""A word head learns which words its recordings have."""

from __future__ import annotations

import numpy as np
import pytest

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.training.word_head import fit_word_head

WORDS = ("gate", "nine", "where", "is")
WIDTH = 16
SILENCE, *CODES = np.random.default_rng(5).normal(size=(len(WORDS) + 1, WIDTH))


def utterance(text: str, values: np.random.Generator) -> np.ndarray:
    """Four frames per word with its code, between two of silence, all with some noise."""
    codes = [SILENCE] * 2
    for word in text.split():
        codes += [CODES[WORDS.index(word)]] * 4 + [SILENCE] * 3
    noise = values.normal(size=(len(codes), WIDTH)) * 0.1
    return np.asarray(np.array(codes) + noise, np.float32)


def test_new_sequences_of_known_words_are_recognised() -> None:
    values = np.random.default_rng(0)
    texts = [" ".join(values.permutation(WORDS)[: values.integers(1, 5)]) for _ in range(128)]
    head = fit_word_head([utterance(text, values) for text in texts], texts, epochs=250)
    assert head.words == tuple(sorted(WORDS))
    new = ["nine gate where", "where is gate nine", "is"]
    assert [head.spot(head.log_p(utterance(text, values))).text for text in new] == new


def test_equal_seeds_give_equal_heads() -> None:
    values = np.random.default_rng(0)
    features = [utterance("gate nine", values) for _ in range(8)]
    first, second = (fit_word_head(features, ["gate nine"] * 8, epochs=2) for _ in range(2))
    np.testing.assert_array_equal(first.weight, second.weight)


@pytest.mark.parametrize("text", ["", " ".join(["gate"] * 9)])
def test_a_recording_without_words_or_with_too_many_is_refused(text: str) -> None:
    features = [np.zeros((16, WIDTH), np.float32)]
    with pytest.raises(SettingsError, match=r"words in 16 frames"):
        fit_word_head(features, [text])
