"""The word head names the words of the likeliest path."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from deeptalk_edge.model.word_head import WordHead

WORDS = ("gate", "nine", "where")


def random_head(width: int = 6) -> WordHead:
    values = np.random.default_rng(0)
    shapes = ((width,), (width,), (len(WORDS) + 1, width), (len(WORDS) + 1,))
    return WordHead(WORDS, *(values.normal(size=shape).astype(np.float32) for shape in shapes))


def path_of(*labels: int) -> np.ndarray:
    """Log-probabilities (n, W + 1) of 0.9 for these labels, the rest shared."""
    p = np.full((len(labels), len(WORDS) + 1), 0.1 / len(WORDS))
    p[np.arange(len(labels)), labels] = 0.9
    return np.asarray(np.log(p), np.float32)


def test_a_head_computes_what_torch_does() -> None:
    head = random_head()
    norm, linear = nn.LayerNorm(6), nn.Linear(6, len(WORDS) + 1)
    with torch.no_grad():
        for parameter, array in zip(
            (norm.weight, norm.bias, linear.weight, linear.bias),
            (head.norm_weight, head.norm_bias, head.weight, head.bias),
            strict=True,
        ):
            parameter.copy_(torch.from_numpy(array))
        features = np.random.default_rng(1).normal(size=(9, 6)).astype(np.float32)
        expected = linear(norm(torch.from_numpy(features))).log_softmax(-1).numpy()
    np.testing.assert_allclose(head.log_p(features), expected, atol=1e-5)


def test_repeats_of_a_label_are_one_word_and_a_blank_separates_two() -> None:
    spotted = random_head().spot(path_of(0, 3, 3, 0, 1, 2, 0, 2, 0))
    assert spotted.text == "where gate nine nine"
    np.testing.assert_allclose(spotted.confidence, 0.9, rtol=1e-5)


def test_silence_has_no_words_and_no_confidence() -> None:
    spotted = random_head().spot(path_of(0, 0, 0))
    assert (spotted.text, spotted.confidence) == ("", 0.0)
