"""Endpointing of plain frames, and the utterance's place in real samples."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deeptalk_edge.errors import AudioError, SettingsError
from deeptalk_edge.model.features import log_mel
from deeptalk_edge.runtime.audio.endpoint import (
    FRAME_MS,
    Edge,
    Endpointer,
    EndpointSettings,
    voiced_span,
)
from deeptalk_edge.runtime.audio.vad import FRAME_SAMPLES, WebRtcDetector, find_utterance
from tests.runtime.sounds import silence, voice
from tests.runtime.speaking_checkpoint import SPEC


class LoudDetector:
    """A fake detector: loud frames are voiced."""

    def is_voiced(self, frame: NDArray[np.float32]) -> bool:
        return bool(np.abs(frame).max() > 0.5)


@pytest.mark.parametrize(("pause_ms", "closes"), [(380, False), (400, True)])
def test_a_short_pause_keeps_the_utterance_open(pause_ms: int, closes: bool) -> None:
    endpointer = Endpointer(EndpointSettings(start_ms=20, hangover_ms=400))
    assert endpointer.push(True) is Edge.OPENED
    edges = [endpointer.push(False) for _ in range(pause_ms // FRAME_MS)]
    assert (Edge.CLOSED in edges) is closes


@given(st.lists(st.booleans(), max_size=80), st.integers(1, 5), st.integers(1, 8))
def test_edges_alternate_and_each_needs_its_time(
    verdicts: list[bool], start: int, hangover: int
) -> None:
    settings = EndpointSettings(start_ms=start * FRAME_MS, hangover_ms=hangover * FRAME_MS)
    endpointer = Endpointer(settings)
    edges = [endpointer.push(voiced) for voiced in verdicts]
    kinds = itertools.cycle([Edge.OPENED, Edge.CLOSED])
    for frame, edge in enumerate(edges):
        if edge is not None:
            assert edge is next(kinds)
            run = start if edge is Edge.OPENED else hangover
            assert verdicts[frame + 1 - run : frame + 1] == [edge is Edge.OPENED] * run


@given(st.lists(st.booleans(), max_size=80), st.integers(1, 5))
def test_a_span_begins_and_ends_in_voice(verdicts: list[bool], start: int) -> None:
    span = voiced_span(verdicts, EndpointSettings(start_ms=start * FRAME_MS))
    runs = [len(list(run)) for voiced, run in itertools.groupby(verdicts) if voiced]
    assert (span is None) is (max(runs, default=0) < start)
    if span is not None:
        first, end = span
        assert all(verdicts[first : first + start])
        assert verdicts[end - 1]


def test_the_utterance_is_cut_with_its_margins() -> None:
    frames = [0.0] * 50 + [1.0] * 20 + [0.0] * 40 + [1.0] * 10 + [0.0] * 60
    pcm = np.repeat(np.array(frames, np.float32), FRAME_SAMPLES)[:-7]
    start, end = find_utterance(pcm, LoudDetector())
    assert start == 50 * FRAME_SAMPLES - 4800  # 300 ms of pre-roll
    assert end == 120 * FRAME_SAMPLES + 3200  # the pause inside is kept, 200 ms of tail


def test_margins_end_where_the_recording_does() -> None:
    pcm = np.ones(10 * FRAME_SAMPLES, np.float32)
    assert find_utterance(pcm, LoudDetector()) == (0, len(pcm))


def test_a_click_is_not_speech() -> None:
    pcm = np.zeros(16000, np.float32)
    pcm[8000:8100] = 1
    with pytest.raises(AudioError, match=r"no speech heard in 1\.0 s"):
        find_utterance(pcm, LoudDetector())


@pytest.mark.parametrize("seconds", [0.001, 3])
def test_silence_is_not_speech(seconds: float) -> None:
    with pytest.raises(AudioError, match="no speech heard"):
        find_utterance(silence(seconds), WebRtcDetector())


def test_webrtc_finds_a_voice_between_silences() -> None:
    pcm = np.concatenate([silence(1), voice(1.5), silence(1)])
    start, end = find_utterance(pcm, WebRtcDetector())
    assert 0.6 * 16000 <= start <= 1.0 * 16000
    assert 2.5 * 16000 <= end <= 3.0 * 16000


def test_a_minute_of_speech_is_refused_with_the_way_out() -> None:
    pcm = voice(60)
    start, end = find_utterance(pcm, WebRtcDetector())
    with pytest.raises(AudioError, match="split the utterance"):
        log_mel(pcm[start:end], SPEC.encoder)


def test_the_margins_may_be_zero() -> None:
    assert EndpointSettings(pre_roll_ms=0, tail_ms=0).tail_ms == 0


@pytest.mark.parametrize("wrong", [{"start_ms": 0}, {"hangover_ms": 10}, {"tail_ms": -1}])
def test_invalid_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError):
        EndpointSettings(**wrong)
