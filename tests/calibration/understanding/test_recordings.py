"""Recordings are cut as the loop cuts them, and their parts are never whole."""

from __future__ import annotations

import random

import numpy as np

from deeptalk_edge.calibration.understanding.recordings import broken_off, framed

RATE_HZ = 16000
WORD, GAP = np.full(RATE_HZ // 5, 0.5, np.float32), np.zeros(RATE_HZ // 20, np.float32)


def test_running_speech_is_broken_off_where_it_is_quiet() -> None:
    speech = np.concatenate([WORD, GAP] * 6)
    for seed in range(20):
        part = broken_off(speech, random.Random(seed))
        assert part is not None
        assert 0.2 * len(speech) < len(part) < 0.95 * len(speech)
        assert speech[len(part)] == 0


def test_silence_around_speech_leaves_no_part_whole() -> None:
    speech = np.concatenate([WORD, GAP] * 6)
    spoken = np.count_nonzero(speech)
    for seed in range(20):
        heard = framed(np.pad(speech, (0, seed)))  # the margins are drawn from the length
        part = broken_off(heard, random.Random(seed))
        assert part is not None
        assert np.count_nonzero(part > 0.1) <= 0.92 * spoken


def test_a_word_of_less_than_400_ms_is_not_broken_off() -> None:
    assert broken_off(np.pad(WORD, RATE_HZ), random.Random(0)) is None
