"""From cues to a probability."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deeptalk_edge.model.question_paths import PathScores
from deeptalk_edge.model.understanding import (
    Manifold,
    Score,
    entropy,
    entropy_cue,
    feature_cues,
    signed_log,
    statistics,
)


def test_a_score_is_a_logistic_sum_and_waits_for_its_cues() -> None:
    score = Score(1.0, {"distance": -2.0, "question": 0.5}, 0.5)
    assert score.p({"distance": 1.0}) is None
    assert score.p({"distance": 1.0, "question": 4.0}) == pytest.approx(1 / (1 + math.exp(-1.0)))
    assert score.p({"distance": 1e9, "question": 0.0}) == pytest.approx(0.0)


def test_the_distance_is_mahalanobis_along_the_basis_and_spherical_across() -> None:
    values = np.random.default_rng(0)
    basis, _ = np.linalg.qr(values.normal(size=(6, 6)))
    variances = np.array([4.0, 2.0, 0.5], np.float32)  # two directions, and the rest
    mean = values.normal(size=6).astype(np.float32)
    features = values.normal(size=(20, 3)).astype(np.float32)
    full = basis @ np.diag([4.0, 2.0, 0.5, 0.5, 0.5, 0.5]) @ basis.T
    offset = statistics(features) - mean
    expected = offset @ np.linalg.solve(full, offset)
    found = Manifold(mean, basis[:, :2].astype(np.float32), variances).squared_distance(features)
    assert found == pytest.approx(expected, rel=1e-4)


def test_cues_are_those_of_the_study() -> None:
    cues = feature_cues(math.e**3, PathScores(free=-1.0, whole=-4.0, begun=-9.0, question=0))
    assert cues["distance"] == pytest.approx(3.0)
    assert cues["question"] == pytest.approx(-math.log(4.0))
    assert cues["whole"] == pytest.approx(math.log(6.0))
    assert feature_cues(None, None) == {}


def test_the_logarithm_keeps_the_sign() -> None:
    assert signed_log(-3.0) == -signed_log(3.0) == -math.log(4.0)


def test_entropy_is_that_of_the_softmax() -> None:
    logits = np.array([1.0, 2.0, 0.5], np.float32)
    p = np.exp(logits) / np.exp(logits).sum()
    assert entropy(logits) == pytest.approx(-float((p * np.log(p)).sum()), rel=1e-6)
    assert entropy(np.array([500.0, 0.0, 0.0])) == pytest.approx(0.0, abs=1e-9)
    assert entropy_cue(0.0) == -7.0
