"""Sounds for tests: a buzz that WebRTC's detector takes for a voice, silence, WAV bytes."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE


def voice(seconds: float, rate_hz: int = 16000) -> Array:
    """A buzz of 120 Hz with falling harmonics, opened and closed like syllables."""
    t = np.arange(int(seconds * rate_hz)) / rate_hz
    buzz = sum(np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 30))
    envelope = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * t)
    return np.asarray(0.15 * envelope * buzz, np.float32)


def silence(seconds: float, rate_hz: int = 16000) -> Array:
    return np.zeros(int(seconds * rate_hz), np.float32)


def wav_bytes(
    samples: bytes,
    *,
    tag: int = PCM,
    bits: int = 16,
    rate_hz: int = 16000,
    channels: int = 1,
    claimed_bytes: int | None = None,
    before: bytes = b"",
) -> bytes:
    """A RIFF file around raw samples; `before` is a chunk to put before the data."""
    block = channels * bits // 8
    sub_format = tag
    fmt = struct.pack("<HHIIHH", tag, channels, rate_hz, block * rate_hz, block, bits)
    if tag == EXTENSIBLE:
        sub_format = FLOAT if bits == 64 else PCM
        fmt += struct.pack("<HHIH14x", 22, bits, 0, sub_format)
    claimed = len(samples) if claimed_bytes is None else claimed_bytes
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + before
    body += b"data" + struct.pack("<I", claimed) + samples
    return b"RIFF" + struct.pack("<I", len(body) & 0xFFFFFFFF) + body


def encode(pcm: NDArray[np.floating], tag: int, bits: int) -> bytes:
    """Encode samples (N,) or (N, channels) for a WAV file of this kind."""
    if tag == FLOAT or (tag == EXTENSIBLE and bits == 64):
        return bytes(pcm.astype(f"<f{bits // 8}").tobytes())
    if bits == 8:
        return bytes((np.rint(pcm * 127) + 128).astype(np.uint8).tobytes())
    whole = np.rint(pcm.astype(np.float64) * (2 ** (bits - 1) - 1)).astype("<i4")
    if bits == 24:
        return bytes(whole.reshape(-1, 1).view(np.uint8)[:, :3].tobytes())
    return bytes(whole.astype(f"<i{bits // 8}").tobytes())
