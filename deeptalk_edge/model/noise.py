"""Noise for SNAC's decoder blocks that is the same however a stream is cut.

A sample depends on (seed, block, its absolute index at the block's rate) and on nothing else.
Source: Steele et al., OOPSLA 2014 (splitmix64); Box and Muller, 1958.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.spec import CodecSpec

SEED_LIMIT = 1 << 64
"""A seed is 64 bits, of whatever it is the seed: noise, ids or training."""


def check_seed(seed: int) -> None:
    """Raises SettingsError if this is no seed."""
    if not 0 <= seed < SEED_LIMIT:
        raise SettingsError(f"seed = {seed}: expected 0 to {SEED_LIMIT - 1} (64 bits)")


def noise_tape(
    spec: CodecSpec, seed: int, num_frames: int, first_frame: int = 0
) -> list[NDArray[np.float32]]:
    """Noise for the codec frames from `first_frame` on: one (1, 1, N) array per decoder block."""
    per_frame, tape = spec.vq_strides[0], []
    for block, stride in enumerate(spec.decoder_rates):
        per_frame *= stride
        noise = gaussian_tape(seed, block, first_frame * per_frame, num_frames * per_frame)
        tape.append(noise[None, None])
    return tape


def gaussian_tape(seed: int, block: int, first: int, count: int) -> NDArray[np.float32]:
    """Samples [first, first + count) of a block's standard normal noise, by position alone."""
    index = np.arange(first, first + count, dtype=np.uint64)
    stream = _splitmix64(np.array([seed], np.uint64)) + np.uint64(block)
    bits = _splitmix64(_splitmix64(stream) + index)
    high = (bits >> np.uint64(32)).astype(np.float64)
    low = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64)
    radius = np.sqrt(-2 * np.log((high + 1) / 2**32))
    return np.asarray(radius * np.cos(2 * math.pi * low / 2**32), np.float32)


def _splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit integers; arithmetic wraps."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
