"""Log-mel against the extractor that Whisper was trained with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from transformers import WhisperFeatureExtractor

from deeptalk_edge.errors import AudioError
from deeptalk_edge.model.features import RATE_HZ, log_mel, max_samples, num_frames
from deeptalk_edge.model.spec import EncoderSpec
from tests.specs import ENCODER

WHISPER = replace(ENCODER, num_mel_bins=80, max_frames=1500)
TWO_SECONDS = replace(ENCODER, num_mel_bins=40, max_frames=100)
TOLERANCE = 1e-4  # theirs is float32 throughout; a unit is 4 decades


def _sound(kind: str, num_samples: int) -> NDArray[np.float32]:
    seconds = np.arange(num_samples) / RATE_HZ
    noise = np.random.default_rng(0).standard_normal(num_samples)
    if kind == "chirp":
        return np.sin(2 * np.pi * (100 + 1500 * seconds) * seconds).astype(np.float32) * 0.5
    return (noise * {"loud": 0.3, "quiet": 1e-4, "silence": 0}[kind]).astype(np.float32)


@pytest.mark.parametrize("kind", ["loud", "quiet", "chirp", "silence"])
@pytest.mark.parametrize("num_samples", [1, 199, 200, 201, 320, 16_000, 31_680, 31_841, 31_999])
def test_log_mel_equals_whispers(kind: str, num_samples: int) -> None:
    _compare(TWO_SECONDS, _sound(kind, num_samples))


@pytest.mark.parametrize("num_samples", [5_000, 479_000, max_samples(WHISPER)])
def test_log_mel_equals_whispers_in_the_real_window(num_samples: int) -> None:
    _compare(WHISPER, _sound("loud", num_samples))


def _compare(spec: EncoderSpec, pcm: NDArray[np.float32]) -> None:
    seconds = spec.max_frames // 50
    whisper: Any = WhisperFeatureExtractor
    theirs = whisper(feature_size=spec.num_mel_bins, chunk_length=seconds)
    expected = theirs(pcm, sampling_rate=RATE_HZ, return_tensors="np").input_features[0]
    found = log_mel(pcm, spec)
    assert found.dtype == np.float32
    assert found.shape == (spec.num_mel_bins, 2 * spec.max_frames)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("num_samples", "expected"), [(1, 1), (319, 1), (320, 2), (16_000, 51), (479_999, 1500)]
)
def test_a_frame_is_kept_every_20_ms_the_first_included(num_samples: int, expected: int) -> None:
    assert num_frames(num_samples) == expected


def test_the_longest_utterance_fills_the_window() -> None:
    assert num_frames(max_samples(WHISPER)) == WHISPER.max_frames


@pytest.mark.parametrize(
    ("pcm", "message"),
    [
        (np.zeros(0, np.float32), "at least one sample"),
        (np.zeros((2, 100), np.float32), r"found shape \(2, 100\)"),
        (np.full(100, np.nan, np.float32), "NaN or infinite"),
        (np.array([0, -np.inf], np.float32), "NaN or infinite"),
        (np.zeros(32_000, np.float32), r"takes less than 2 s at a time; split"),
    ],
)
def test_pcm_that_the_encoder_cannot_take_is_refused(
    pcm: NDArray[np.float32], message: str
) -> None:
    with pytest.raises(AudioError, match=message):
        log_mel(pcm, TWO_SECONDS)
