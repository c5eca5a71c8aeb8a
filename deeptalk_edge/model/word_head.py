"""The word head: which words an utterance's features name.

Source: Graves et al. 2006, connectionist temporal classification. A layer norm and one matrix over
the encoder's features; label 0 is the blank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

BLANK = 0
_EPSILON = 1e-5  # of torch's LayerNorm, which trains it


@dataclass(frozen=True, slots=True)
class Spotted:
    """The words that the likeliest path names."""

    text: str
    confidence: float
    """Geometric mean of each word's highest probability, 0 to 1; 0 if there is no word."""


@dataclass(frozen=True, slots=True)
class WordHead:
    """W words over features of width C."""

    words: tuple[str, ...]
    norm_weight: Array
    """(C)."""
    norm_bias: Array
    """(C)."""
    weight: Array
    """(W + 1, C): the blank, then each word."""
    bias: Array
    """(W + 1)."""

    def log_p(self, features: Array) -> Array:
        """Features (n, C) to the log-probability of each label in each frame, (n, W + 1)."""
        centred = features - features.mean(axis=1, keepdims=True)
        scale = np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + np.float32(_EPSILON))
        logits = (centred / scale * self.norm_weight + self.norm_bias) @ self.weight.T + self.bias
        logits -= logits.max(axis=1, keepdims=True)
        log_p: Array = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return log_p

    def spot(self, log_p: Array) -> Spotted:
        """The words of the likeliest path through (n, W + 1): runs of a label, blanks dropped."""
        labels, peaks = log_p.argmax(axis=1), log_p.max(axis=1)
        starts = np.flatnonzero(np.diff(labels, prepend=-1))
        runs = [
            (int(labels[start]), float(peaks[start:end].max()))
            for start, end in zip(starts, [*starts[1:], len(labels)], strict=True)
            if labels[start] != BLANK
        ]
        text = " ".join(self.words[label - 1] for label, _ in runs)
        confidence = float(np.exp(np.mean([peak for _, peak in runs]))) if runs else 0.0
        return Spotted(text, confidence)
