"""Joules of a trace whose integral is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeptalk_edge.devices.energy import PowerSample, counted_j, energy_j, watts_of_counter


def trace(power, hz: float, seconds: float) -> list[PowerSample]:  # type: ignore[no-untyped-def]
    return [PowerSample(i / hz, power(i / hz)) for i in range(round(hz * seconds) + 1)]


def test_a_ramp_is_integrated_exactly_between_samples() -> None:
    samples = trace(lambda at_s: 2 + 3 * at_s, hz=5, seconds=10)
    # 2 t + 1.5 t^2 from 1.05 to 7.93, neither of them a sample
    assert energy_j(samples, 1.05, 7.93) == pytest.approx(
        2 * (7.93 - 1.05) + 1.5 * (7.93**2 - 1.05**2)
    )


def test_a_wave_is_integrated_within_a_percent_at_five_hertz() -> None:
    samples = trace(lambda at_s: 10 + 4 * math.sin(2 * math.pi * at_s / 3), hz=5, seconds=12)
    assert energy_j(samples, 0, 9) == pytest.approx(90, rel=0.01)


def test_a_turn_that_the_samples_do_not_cover_has_no_energy() -> None:
    samples = trace(lambda at_s: 5.0, hz=5, seconds=2)
    assert energy_j(samples, 0, 2) == pytest.approx(10)
    assert energy_j(samples, -0.1, 2) is None
    assert energy_j(samples, 0, 2.1) is None
    assert energy_j(samples, 1, 1) is None
    assert energy_j(samples[:1], 0, 0.1) is None


@given(
    watts=st.lists(st.floats(0, 500), min_size=2, max_size=20),
    cut=st.floats(0.01, 0.99),
)
def test_the_energy_of_two_parts_adds_up_to_the_whole(watts: list[float], cut: float) -> None:
    samples = [PowerSample(float(i), value) for i, value in enumerate(watts)]
    end_s = float(len(watts) - 1)
    parts = (energy_j(samples, 0, cut * end_s), energy_j(samples, cut * end_s, end_s))
    assert sum(part or 0 for part in parts) == pytest.approx(energy_j(samples, 0, end_s))


def test_a_counter_that_wraps_continues() -> None:
    assert counted_j(5, 7, None) == 2
    assert counted_j(262_140, 2, 262_143.3) == pytest.approx(5.3)
    assert counted_j(262_140, 2, None) is None
    samples = watts_of_counter([(0, 262_140.0), (1, 2.0), (3, 12.0)], 262_143.3)
    assert [(s.at_s, s.watts) for s in samples] == [(1, pytest.approx(5.3)), (3, 5)]
