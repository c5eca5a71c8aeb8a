"""The bench of stop words: words at the echo's level, found in time; onsets of noise."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bench.stop_words import Take, beginnings, heard_at, is_in_time, over_answer
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.level import loud_dbfs
from tests.runtime.sounds import voice

Array = NDArray[np.float32]


class SampleSpotter:
    """Finds the word in a single loud sample."""

    def begin(self) -> None:
        pass

    def hears(self, pcm: Array) -> bool:
        return bool(pcm.max() > 0.9)


def with_word_at(place: int) -> Array:
    pcm = np.zeros(20800, np.float32)
    pcm[place] = 1.0
    return pcm


def test_a_word_is_as_loud_as_the_echo_and_the_canceller_keeps_most_of_it() -> None:
    pytest.importorskip("pywebrtc_audio")
    answer = np.tile(voice(1.0) * np.linspace(1, 0.2, RATE_HZ, dtype=np.float32), 6)
    word = np.random.default_rng(1).standard_normal(RATE_HZ // 2).astype(np.float32)
    take = over_answer(word, answer, np.random.default_rng(0))
    assert len(take.alone) == len(take.cancelled) == 1.3 * RATE_HZ
    assert loud_dbfs(take.alone) == pytest.approx(loud_dbfs(answer) - 9, abs=1)
    assert -1 < take.loss_db < 12
    word_at = slice(4928, 4928 + len(word))
    assert loud_dbfs(take.raised[word_at]) == pytest.approx(-20, abs=0.1)


@pytest.mark.parametrize(("place", "in_time"), [(5000, True), (15900, True), (16000, False)])
def test_a_word_counts_if_it_is_heard_within_600_ms_of_its_end(place: int, in_time: bool) -> None:
    pcm = with_word_at(place)
    take = Take(alone=pcm, cancelled=pcm, num_samples=1600)
    spotter = SampleSpotter()
    assert heard_at(spotter, pcm) == -(-(place + 1) // 320) * 320
    assert is_in_time(spotter, take, pcm) is in_time


def test_a_noise_begins_after_200_ms_of_quiet() -> None:
    noise = np.zeros(8 * RATE_HZ, np.float32)
    for begin_s in (1.0, 1.1, 3.0):
        noise[round(begin_s * RATE_HZ)] = 0.5
    first, second = beginnings(noise)
    assert first[0] == second[0] == 0.5
    assert len(first) == RATE_HZ
    assert len(beginnings(np.full(8 * RATE_HZ, 0.5, np.float32))) == 2  # steady noise: some places
