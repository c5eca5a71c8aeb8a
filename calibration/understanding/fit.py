"""From measured recordings to what tells questions from anything else.

distance     a normal distribution of good recordings' statistics, shrunk (Ledoit and Wolf 2004)
scores       logistic sums of cues; where nothing but questions was recorded, the weights that
             were found for the shipped checkpoint on 707 recordings
thresholds   2 % of the questions answered right are refused; 5 % of the parts count as whole
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.understanding import Header, Understanding
from deeptalk_edge.calibration.understanding.cues import Measured
from deeptalk_edge.model.question_paths import QuestionPaths
from deeptalk_edge.model.understanding import (
    SURE_P,
    CueName,
    Cues,
    Manifold,
    Score,
    entropy_cue,
    feature_cues,
    statistics,
)
from deeptalk_edge.model.word_head import WordHead

Array = NDArray[np.float64]

REFUSED_SHARE = 0.02
"""Of the questions that would be answered right."""
PARTS_SHARE = 0.05
"""Of the parts of questions that count as whole."""
MAX_DIRECTIONS = 512
"""A basis of the official width (4096, R) then takes 8 MB."""

_BEFORE_PREFILL: tuple[CueName, ...] = ("distance", "question")
_BEFORE_SOUND: tuple[CueName, ...] = ("entropy", "distance")
_BEFORE_SOUND_WITH_HEAD: tuple[CueName, ...] = (*_BEFORE_SOUND, "question")
_COMPLETE: tuple[CueName, ...] = ("entropy", "whole", "question", "distance")
_KNOWN: dict[tuple[CueName, ...], tuple[float, tuple[float, ...]]] = {
    _BEFORE_PREFILL: (30.4, (-4.5, 2.57)),
    _BEFORE_SOUND: (22.4, (-2.6, -4.46)),
}
"""Bias and weights without recordings of the other kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sets:
    """Recordings by what they are."""

    questions: Sequence[Measured]
    """Answered right."""
    wrong: Sequence[Measured] = ()
    """Questions that got a wrong answer."""
    others: Sequence[Measured]
    """No questions at all; may be empty."""
    parts: Sequence[Measured]
    """Broken off; may be empty."""


def fit_manifold(measured: Sequence[Measured]) -> Manifold:
    """The distribution of good recordings, two or more."""
    x = np.array([statistics(one.features) for one in measured], np.float64)
    mean = x.mean(axis=0)
    covariance = _shrunk(x - mean)
    values, vectors = np.linalg.eigh(covariance)
    kept = min(len(values), MAX_DIRECTIONS)
    rest = float(values[: len(values) - kept].mean()) if kept < len(values) else float(values[0])
    return Manifold(
        mean.astype(np.float32),
        np.ascontiguousarray(vectors[:, ::-1][:, :kept], np.float32),
        np.array([*values[::-1][:kept], rest], np.float32),
    )


def _shrunk(x: Array) -> Array:
    """The shrunk covariance of centred rows (n, p)."""
    n, p = x.shape
    covariance = x.T @ x / n
    mean_variance = float(np.trace(covariance)) / p
    spread = (float(np.square(covariance).sum()) - p * mean_variance**2) / p
    squares = np.square(x)
    noise = (float((squares.T @ squares).sum()) / n - float(np.square(covariance).sum())) / (p * n)
    shrinkage = min(noise, spread) / spread if spread > 0 else 1.0
    covariance = np.asarray((1 - shrinkage) * covariance)
    covariance[np.diag_indices(p)] += shrinkage * mean_variance
    return covariance


def fit_understanding(
    sets: Sets, head: WordHead | None, questions: Sequence[str], manifold: Manifold, source: str
) -> Understanding:
    """Scores and thresholds for these recordings; `questions` are in words of the head."""
    paths = QuestionPaths(head.words, questions) if head and questions else None
    header = Header(
        words=head.words if head else (),
        questions=tuple(questions) if paths else (),
        source=source,
    )
    cues = _Cues(head, paths, manifold)
    good, others = cues.of(sets.questions), cues.of(sets.others)
    parts, wrong = cues.of(sets.parts), cues.of(sets.wrong)
    early = _early(good, others) if paths else None
    late_cues = _BEFORE_SOUND_WITH_HEAD if paths and others else _BEFORE_SOUND
    return Understanding(
        Header(
            words=header.words,
            questions=header.questions,
            before_prefill=early,
            before_sound=_late(late_cues, good, [*wrong, *others] if others else [], early),
            complete=_complete(good, parts) if paths and parts else None,
            source=source,
        ),
        head,
        manifold,
    )


class _Cues:
    """All cues of recordings."""

    def __init__(
        self, head: WordHead | None, paths: QuestionPaths | None, manifold: Manifold
    ) -> None:
        self._head, self._paths, self._manifold = head, paths, manifold

    def of(self, measured: Sequence[Measured]) -> list[Cues]:
        return [self._of(one) for one in measured]

    def _of(self, one: Measured) -> Cues:
        paths = None
        if self._head and self._paths:
            paths = self._paths.scores(self._head.log_p(one.features))
        distance = self._manifold.squared_distance(one.features)
        return {**feature_cues(distance, paths), "entropy": entropy_cue(one.mean_entropy)}


def _early(good: Sequence[Cues], others: Sequence[Cues]) -> Score:
    """By the features: half of the right answers that may be refused."""
    score = _score(_BEFORE_PREFILL, good, others, alike=True)
    return replace(score, least_p=float(np.quantile(_ps(score, good), REFUSED_SHARE / 2)))


def _late(
    names: tuple[CueName, ...], good: Sequence[Cues], bad: Sequence[Cues], early: Score | None
) -> Score:
    """By the answer's first rows, where the features leave a doubt: the other half. Every recording
    counts once: mistakes are rare, and to count them as often as right answers would make all of
    them look likely."""
    score = _score(names, good, bad, alike=False)
    early_ps = _ps(early, good) if early else np.zeros(len(good))
    is_doubtful = early_ps < SURE_P
    num_refused = int(REFUSED_SHARE * len(good))
    if early is not None:
        is_doubtful &= early_ps >= early.least_p
        num_refused -= int((early_ps < early.least_p).sum())
    doubtful = np.sort(_ps(score, good)[is_doubtful])
    if not len(doubtful):
        return score
    return replace(score, least_p=float(doubtful[min(num_refused, len(doubtful) - 1)]))


def _score(
    names: tuple[CueName, ...], good: Sequence[Cues], bad: Sequence[Cues], *, alike: bool
) -> Score:
    bias, weights = _logistic(names, good, bad, alike=alike) if bad else _KNOWN[names]
    return Score(bias, dict(zip(names, weights, strict=True)), 0.0)


def _ps(score: Score, recordings: Sequence[Cues]) -> Array:
    return np.array([score.p(one) or 0.0 for one in recordings])


def _complete(good: Sequence[Cues], parts: Sequence[Cues]) -> Score:
    score = _score(_COMPLETE, good, parts, alike=True)
    least_p = float(np.quantile(_ps(score, parts), 1 - PARTS_SHARE, method="higher"))
    return replace(score, least_p=least_p)


def _logistic(
    names: tuple[CueName, ...],
    good: Sequence[Cues],
    bad: Sequence[Cues],
    *,
    alike: bool,
) -> tuple[float, tuple[float, ...]]:
    """Bias and weights by Newton's method, with a ridge of 1 on the weights; `alike`: both kinds
    count alike, however many of each there are."""
    x = np.array([[1.0, *(one[name] for name in names)] for one in (*good, *bad)])
    y = np.array([1.0] * len(good) + [0.0] * len(bad))
    counts = np.ones(len(y))
    if alike:
        counts = np.where(y == 1, len(y) / 2 / max(len(good), 1), len(y) / 2 / max(len(bad), 1))
    ridge = np.diag([1e-9, *[1.0] * len(names)])
    w = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
        gradient = x.T @ (counts * (p - y)) + ridge @ w
        curvature = (x * (counts * p * (1 - p))[:, None]).T @ x + ridge
        step = np.linalg.solve(curvature, gradient)
        w -= step
        if np.abs(step).max() < 1e-9:
            break
    return float(w[0]), tuple(map(float, w[1:]))
