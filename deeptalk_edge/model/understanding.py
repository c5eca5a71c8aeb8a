"""From cues to the probability that an utterance was understood, or that it is a whole question.

A cue is one number, compressed so that a logistic sum of few of them is calibrated:

entropy      log10 of the text logits' mean entropy over an answer's first rows
distance     ln of the squared Mahalanobis distance of the features' mean and standard deviation
             from those of good recordings
question     how far the best question's path is below the free path, through `signed_log`
whole        how far the best question's path is above the best proper beginning's, likewise
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.question_paths import PathScores
from deeptalk_edge.schema import Between

Array = NDArray[np.float32]

CueName: TypeAlias = Literal["entropy", "distance", "question", "whole"]
Cues: TypeAlias = Mapping[CueName, float]

SURE_P = 0.95
"""From here on the features alone suffice: of fresh recordings `bench understanding` finds 96 % of
these answered right."""
_LEAST_ENTROPY = 1e-7  # nats: below it, float32 logits are all rounding
_Number = Annotated[float, Between(-1e6, 1e6)]


@dataclass(frozen=True, slots=True)
class Score:
    """A logistic sum of cues, and the least probability that passes."""

    bias: _Number
    weights: Mapping[CueName, _Number]
    least_p: Annotated[float, Between(0, 1)]

    def p(self, cues: Cues) -> float | None:
        """The probability, 0 to 1; None if a cue is missing."""
        if not self.weights.keys() <= cues.keys():
            return None
        total = self.bias + sum(weight * cues[name] for name, weight in self.weights.items())
        return 1 / (1 + math.exp(-min(max(total, -500), 500)))


@dataclass(frozen=True, slots=True)
class Manifold:
    """Where good recordings lie: a normal distribution of their features' statistics, of full
    variance along R directions and of one variance across them."""

    mean: Array
    """(2 C)."""
    basis: Array
    """(2 C, R), orthonormal columns."""
    variances: Array
    """(R + 1), above 0: along each direction, and across them."""

    def squared_distance(self, features: Array) -> float:
        """The squared Mahalanobis distance of features (n, C)."""
        offset = statistics(features) - self.mean
        along = np.square(offset @ self.basis)
        across = max(float(np.square(offset).sum() - along.sum()), 0.0)
        return float((along / self.variances[:-1]).sum()) + across / float(self.variances[-1])


def statistics(features: Array) -> Array:
    """Features (n, C) to the mean and standard deviation of each dimension, (2 C)."""
    found: Array = np.concatenate([features.mean(axis=0), features.std(axis=0)])
    return found


def signed_log(value: float) -> float:
    """`sign(x) ln(1 + |x|)`: log-probabilities of a whole utterance, in a logistic's range."""
    return math.copysign(math.log1p(abs(value)), value)


def feature_cues(squared_distance: float | None, paths: PathScores | None) -> dict[CueName, float]:
    """The cues that an utterance's features give."""
    cues: dict[CueName, float] = {}
    if squared_distance is not None:
        cues["distance"] = math.log(max(squared_distance, 1.0))
    if paths is not None:
        cues["question"] = signed_log(paths.whole - paths.free)
        cues["whole"] = signed_log(paths.whole - paths.begun)
    return cues


def entropy_cue(mean_entropy: float) -> float:
    """Of a mean entropy in nats."""
    return math.log10(max(mean_entropy, _LEAST_ENTROPY))


def entropy(logits: NDArray[np.floating]) -> float:
    """Of one row of logits (V), in nats."""
    shifted = logits.astype(np.float64) - float(logits.max())
    likelihoods = np.exp(shifted)
    total = float(likelihoods.sum())
    return math.log(total) - float((likelihoods * shifted).sum()) / total
