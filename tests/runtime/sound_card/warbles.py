"""Sounds that survive a sound card, and comparisons of sounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.audio.ports import MicFrame, SoundPort

Array = NDArray[np.float32]


def warble(seconds: float, rate_hz: int, seed: int = 0) -> Array:
    """Band-limited noise in syllables: every piece differs from all others."""
    rng = np.random.default_rng(seed)
    n = int(seconds * rate_hz)
    spectrum = np.fft.rfft(rng.standard_normal(n))
    hz = np.fft.rfftfreq(n, 1 / rate_hz)
    spectrum[(hz < 200) | (hz > 5000)] = 0
    noise = np.fft.irfft(spectrum, n)
    syllables = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * np.arange(n) / rate_hz)
    return np.asarray(0.5 * syllables * noise / np.abs(noise).max(), np.float32)


def find(piece: Array, heard: Array) -> tuple[int, float, float]:
    """Find `piece` in `heard`: its place, correlation and gain.

    A card at 48 kHz may put it between two samples: it is moved by quarters of one.
    """
    n = 1 << (len(heard) + len(piece)).bit_length()
    spectrum, hz = np.fft.rfft(piece, n), np.fft.rfftfreq(n)
    product = np.fft.rfft(heard, n) * np.conj(spectrum)
    place = int(np.argmax(np.fft.irfft(product, n)[: len(heard) - len(piece) + 1]))
    found = heard[place : place + len(piece)]
    best = (place, 0.0, 0.0)
    for shift in np.arange(-0.75, 1, 0.25):
        moved = np.fft.irfft(spectrum * np.exp(-2j * np.pi * hz * shift), n)[: len(piece)]
        power, likeness = float(moved @ moved), float(moved @ found)
        correlation = likeness / np.sqrt(power * float(found @ found))
        if correlation > best[1]:
            best = (place, correlation, likeness / power)
    return best


def assert_intact(said: Array, heard: Array, rate_hz: int) -> None:
    """Check that every quarter second of `said` is in `heard` with a correlation of 0.99."""
    pieces = said[: len(said) // (rate_hz // 4) * (rate_hz // 4)].reshape(-1, rate_hz // 4)
    correlations = np.array([find(piece, heard)[1] for piece in pieces])
    print(f"{len(pieces)} quarter seconds, the worst is correlated {correlations.min():.4f}")
    assert correlations.min() >= 0.99, correlations


def hear(port: SoundPort, seconds: float) -> tuple[Array, Array]:
    """Read the microphone and the far end for `seconds`, by the microphone's clock."""
    frames: list[MicFrame] = []
    while len(frames) < seconds * 50:
        frame = port.read(0.2)
        if frame is not None:
            frames.append(frame)
    starts = np.array([frame.start for frame in frames])
    assert (np.diff(starts) == 320).all()
    return np.concatenate([f.pcm for f in frames]), np.concatenate([f.far for f in frames])
