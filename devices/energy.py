"""Joules out of power readings: a trapezoid between samples, or a counter that may wrap."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PowerSample:
    """Watts at a moment, in seconds of a monotonic clock."""

    at_s: float
    watts: float


def energy_j(samples: Sequence[PowerSample], start_s: float, end_s: float) -> float | None:
    """Of the time from `start_s` to `end_s`, by the trapezoid rule, samples in order of time.

    Power at the ends is interpolated. None if the samples do not reach from one end to the other:
    a guess beyond them would be no measurement.
    """
    if end_s <= start_s or len(samples) < 2:
        return None
    if samples[0].at_s > start_s or samples[-1].at_s < end_s:
        return None
    inside = [sample for sample in samples if start_s < sample.at_s < end_s]
    points = [_at(samples, start_s), *inside, _at(samples, end_s)]
    return sum((b.at_s - a.at_s) * (a.watts + b.watts) / 2 for a, b in itertools.pairwise(points))


def _at(samples: Sequence[PowerSample], moment_s: float) -> PowerSample:
    for a, b in itertools.pairwise(samples):
        if a.at_s <= moment_s <= b.at_s:
            if b.at_s == a.at_s:
                return PowerSample(moment_s, b.watts)
            share = (moment_s - a.at_s) / (b.at_s - a.at_s)
            return PowerSample(moment_s, a.watts + share * (b.watts - a.watts))
    raise AssertionError("the caller has checked that the samples reach there")


def counted_j(before_j: float, now_j: float, wrap_j: float | None) -> float | None:
    """What a counter of joules went up by; None if it went down and its wrap is unknown."""
    if now_j >= before_j:
        return now_j - before_j
    return None if wrap_j is None else now_j - before_j + wrap_j


def watts_of_counter(
    readings: Sequence[tuple[float, float]], wrap_j: float | None
) -> list[PowerSample]:
    """Power between readings (seconds, joules) of a counter, each at the end of its interval."""
    samples = []
    for (before_s, before_j), (now_s, now_j) in itertools.pairwise(readings):
        joules = counted_j(before_j, now_j, wrap_j)
        if joules is not None and now_s > before_s:
            samples.append(PowerSample(now_s, joules / (now_s - before_s)))
    return samples
