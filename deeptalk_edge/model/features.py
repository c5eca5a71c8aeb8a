"""PCM to log-mel: one implementation for training and device.

Equal to Whisper's feature extractor: 16 kHz, a periodic Hann window of 25 ms every 10 ms, power
spectrum, Slaney mel filters, log10, the range clamped to 8 decades below the maximum of the window,
then (x + 4) / 4. Source: openai/whisper `audio.py`; transformers `WhisperFeatureExtractor`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import AudioError
from deeptalk_edge.model.spec import EncoderSpec

Array = NDArray[np.float32]

RATE_HZ = 16_000
FFT_SAMPLES = 400
HOP_SAMPLES = 160
SAMPLES_PER_FRAME = 2 * HOP_SAMPLES  # the encoder's second convolution has stride 2

_FLOOR = 1e-10  # of the power, before the logarithm


def max_samples(spec: EncoderSpec) -> int:
    """The longest utterance whose frames fit into the window (just under 30 s in Whisper)."""
    return spec.max_frames * SAMPLES_PER_FRAME - 1


def num_frames(num_samples: int) -> int:
    """Encoder frames kept for an utterance: one every 20 ms, the first one included.

    Source: DeepTalk `data_util.py`, `int(n / 16000 * 50) + 1`.
    """
    return num_samples // SAMPLES_PER_FRAME + 1


def log_mel(pcm: Array, spec: EncoderSpec) -> Array:
    """Log-mel of 16 kHz mono PCM (N,), padded with silence to the encoder's window.

    Returns (num_mel_bins, 2 * max_frames).

    Raises AudioError if the PCM is empty, not finite, or longer than the window.
    """
    if pcm.ndim != 1 or pcm.size == 0:
        raise AudioError(f"expected mono PCM with at least one sample, found shape {pcm.shape}")
    if not np.isfinite(pcm).all():
        raise AudioError("the PCM holds NaN or infinite samples; repair the recording")
    limit = max_samples(spec)
    if pcm.size > limit:
        raise AudioError(
            f"{pcm.size / RATE_HZ:.1f} s of audio: the encoder takes less than "
            f"{(limit + 1) / RATE_HZ:g} s at a time; split the utterance"
        )
    total, half = 2 * spec.max_frames, FFT_SAMPLES // 2
    window = np.zeros(total * HOP_SAMPLES, np.float32)
    window[: pcm.size] = pcm
    frames = np.lib.stride_tricks.sliding_window_view(
        np.pad(window, half, mode="reflect"), FFT_SAMPLES
    )[::HOP_SAMPLES]
    # Frames that lie wholly in the silent padding have no power: only the others are transformed.
    live = min(total, (pcm.size + half - 1) // HOP_SAMPLES + 1)
    power = np.abs(np.fft.rfft(frames[:live] * _hann(), axis=1)) ** 2
    mel = np.full((spec.num_mel_bins, total), _FLOOR, np.float32)
    mel[:, :live] = mel_filters(spec.num_mel_bins) @ power.T
    log = np.log10(np.maximum(mel, _FLOOR))
    log = np.maximum(log, log.max() - 8.0)
    return np.asarray((log + 4.0) / 4.0, np.float32)


@lru_cache(maxsize=1)
def _hann() -> NDArray[np.float64]:
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT_SAMPLES) / FFT_SAMPLES)


@lru_cache(maxsize=4)
def mel_filters(num_bins: int) -> NDArray[np.float64]:
    """Slaney's triangular filters with unit area, 0 to 8 kHz: (num_bins, FFT_SAMPLES / 2 + 1)."""
    edges = _mel_to_hz(np.linspace(0.0, _hz_to_mel(RATE_HZ / 2), num_bins + 2))
    bins = np.linspace(0.0, RATE_HZ / 2, FFT_SAMPLES // 2 + 1)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    return np.asarray(triangles * (2.0 / (edges[2:] - edges[:-2]))[:, None])


def _hz_to_mel(hz: float) -> float:
    """Slaney's scale: linear below 1 kHz, logarithmic above."""
    return hz / 200 * 3 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))
