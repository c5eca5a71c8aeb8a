"""Noises follow from a seed and have the documented level and sound."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bench.noise import KINDS, NOISE_DBFS, SPOKEN, make_noise
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.level import level_dbfs, loud_dbfs
from deeptalk_edge.training.tiny.voices import need_synthesisers

Array = NDArray[np.float32]


def noise(kind: str, seed: int = 1, seconds: float = 8.0) -> Array:
    if kind in SPOKEN:
        try:
            need_synthesisers()
        except SettingsError as error:
            pytest.skip(str(error))
    return make_noise(kind, seed, seconds)


def share_below(pcm: Array, hz: float) -> float:
    """Share of the power below a frequency."""
    power = np.abs(np.fft.rfft(pcm)) ** 2
    return float(power[: int(hz * len(pcm) / RATE_HZ)].sum() / power.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_make_equal_noise_and_other_seeds_other_noise(kind: str) -> None:
    first = noise(kind)
    assert first.dtype == np.float32
    assert len(first) == 8 * RATE_HZ
    np.testing.assert_array_equal(first, noise(kind))
    assert not np.array_equal(first, noise(kind, seed=2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loudest_200_ms_of_a_noise_have_the_documented_level(kind: str) -> None:
    assert loud_dbfs(noise(kind)) == pytest.approx(NOISE_DBFS, abs=0.01)


@pytest.mark.parametrize("kind", ["fan", "rain", "music"])
def test_steady_noise_has_no_silent_second(kind: str) -> None:
    seconds = noise(kind).reshape(-1, RATE_HZ)
    assert min(map(level_dbfs, seconds)) > NOISE_DBFS - 15


@pytest.mark.parametrize("kind", ["tap", "paper", "tray", "keys", "cough", "laugh", "door"])
def test_events_leave_silence_between_them(kind: str) -> None:
    assert np.median(np.abs(noise(kind, seconds=20.0))) < 1e-4


def test_a_door_is_low_and_keys_are_high() -> None:
    assert share_below(noise("door"), 1000) > 0.9
    assert share_below(noise("keys"), 3000) < 0.05
