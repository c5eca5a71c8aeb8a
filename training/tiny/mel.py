"""Log-mel frames on the codec's own grid; for training only."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from deeptalk_edge.model.spec import CodecSpec

NUM_MELS = 100
MEL_TOP_HZ = 8000
WINDOW = 1024
FFT_SIZE = 2048


def mel_filters(rate_hz: int, fft_size: int, num_mels: int, top_hz: float) -> Tensor:
    """Triangular filters, (num_mels, fft_size / 2 + 1), each of unit sum."""
    top_mel = 2595 * math.log10(1 + top_hz / 700)
    edges = 700 * (10 ** (np.linspace(0, top_mel, num_mels + 2) / 2595) - 1)
    bins = np.linspace(0, rate_hz / 2, fft_size // 2 + 1)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    filters = np.maximum(filters, 0)
    return torch.tensor(filters / (filters.sum(1, keepdims=True) + 1e-8), dtype=torch.float32)


class LogMel(nn.Module):
    """(B, N) samples to (B, M, N / hop); frame f is centred on sample hop * (f + 1/2)."""

    filters: Tensor
    window: Tensor

    def __init__(self, spec: CodecSpec) -> None:
        super().__init__()
        self.hop = spec.hop_samples
        filters = mel_filters(spec.sampling_rate, FFT_SIZE, NUM_MELS, MEL_TOP_HZ)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        padded = functional.pad(samples, [(FFT_SIZE - self.hop) // 2] * 2)
        spectrum = torch.stft(
            padded, FFT_SIZE, self.hop, WINDOW, self.window, center=False, return_complex=True
        )
        return torch.log(self.filters @ spectrum.abs() + 1e-3)
