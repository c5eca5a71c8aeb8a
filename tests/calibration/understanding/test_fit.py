"""Fits of the distance, the scores and the thresholds."""

from __future__ import annotations

import numpy as np
import pytest

from deeptalk_edge.calibration.understanding.cues import Measured
from deeptalk_edge.calibration.understanding.fit import Sets, fit_manifold, fit_understanding
from deeptalk_edge.calibration.understanding.recordings import Recording
from deeptalk_edge.model.understanding import entropy_cue, feature_cues

WIDTH, FRAMES = 4, 30


def measured(kind: str, num: int, seed: int) -> list[Measured]:
    """Features around 0 for questions, around 3 for others; others leave the model unsure."""
    values = np.random.default_rng(seed)
    centre, entropy = (0.0, 1e-4) if kind == "question" else (3.0, 0.3)
    return [
        Measured(
            Recording(name=f"{kind} {i}", pcm=np.zeros(1, np.float32)),
            (values.normal(size=(FRAMES, WIDTH)) + centre).astype(np.float32),
            float(entropy * values.uniform(0.2, 5)),
            "",
        )
        for i in range(num)
    ]


def test_the_distance_of_good_recordings_is_their_number_of_dimensions() -> None:
    good = measured("question", 4000, 0)
    manifold = fit_manifold(good)
    found = [manifold.squared_distance(one.features) for one in measured("question", 400, 1)]
    assert np.mean(found) == pytest.approx(2 * WIDTH, rel=0.1)


def test_few_recordings_are_shrunk_to_a_sphere_and_stay_usable() -> None:
    few = fit_manifold(measured("question", 3, 0))
    assert few.variances.min() > 0
    assert np.isfinite(few.squared_distance(measured("other", 1, 0)[0].features))


def test_two_in_a_hundred_right_questions_are_refused_and_others_go() -> None:
    good = measured("question", 300, 2)
    sets = Sets(questions=good, others=measured("other", 200, 3), parts=[])
    found = fit_understanding(sets, None, [], fit_manifold(measured("question", 300, 4)), "a test")
    score = found.header.before_sound
    assert score is not None
    assert found.header.before_prefill is None
    assert found.manifold is not None

    def p(one: Measured) -> float:
        assert found.manifold is not None
        assert score is not None
        cues = feature_cues(found.manifold.squared_distance(one.features), None)
        p = score.p({**cues, "entropy": entropy_cue(one.mean_entropy)})
        assert p is not None
        return p

    refused = np.mean([p(one) < score.least_p for one in good])
    assert 0.01 <= refused <= 0.03
    assert all(p(one) < score.least_p for one in measured("other", 100, 5))


def test_without_other_recordings_the_weights_are_the_known_ones() -> None:
    good = measured("question", 100, 2)
    sets = Sets(questions=good, others=[], parts=[])
    score = fit_understanding(sets, None, [], fit_manifold(good), "").header.before_sound
    assert score is not None
    assert dict(score.weights) == {"entropy": -2.6, "distance": -4.46}
