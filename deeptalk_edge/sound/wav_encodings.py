"""The encodings that a WAV file's samples may have: bytes to float, full scale at 1.

integers   8 bits from 0 to 255, else signed
floats     as they are
mu-law, A-law   8 bits on a logarithmic scale, of 14 and 13 bits. Source: ITU-T G.711
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
ByteOrder = Literal["<", ">"]

PCM, FLOAT, A_LAW, MU_LAW, EXTENSIBLE = 1, 3, 6, 7, 0xFFFE


def decode(samples: bytes, tag: int, bits: int, order: ByteOrder) -> Array | None:
    """Samples (N,), channels beside each other; None if this encoding is not known here."""
    match tag, bits:
        case 1, 8:
            return np.frombuffer(samples, np.uint8).astype(np.float32) / np.float32(128) - 1
        case 1, 16:
            return np.frombuffer(samples, f"{order}i2").astype(np.float32) / np.float32(2**15)
        case 1, 24:
            return _decode_24_bits(samples, order)
        case 1, 32:
            return (np.frombuffer(samples, f"{order}i4") / 2**31).astype(np.float32)
        case 3, 32 | 64:
            # A file of 64 bits may hold what 32 cannot: infinite then, which is refused later.
            with np.errstate(over="ignore"):
                return np.frombuffer(samples, f"{order}f{bits // 8}").astype(np.float32)
        case 6, 8:
            return _A_LAW_VALUES[np.frombuffer(samples, np.uint8)]
        case 7, 8:
            return _MU_LAW_VALUES[np.frombuffer(samples, np.uint8)]
    return None


def _decode_24_bits(samples: bytes, order: ByteOrder) -> Array:
    triples = np.frombuffer(samples, np.uint8).reshape(-1, 3)
    # The lowest byte of an int32 is 0.
    padded = np.pad(triples, ((0, 0), (1, 0) if order == "<" else (0, 1)))
    wide: Array = padded.reshape(-1).view(f"{order}i4").astype(np.float32) / np.float32(2**31)
    return wide


def _mu_law_values() -> Array:
    code = ~np.arange(256, dtype=np.uint8)
    exponent, mantissa = (code >> 4 & 7).astype(int), (code & 15).astype(int)
    magnitude = ((2 * mantissa + 33) << exponent) - 33
    return np.asarray(np.where(code & 0x80, -magnitude, magnitude) / 2**13, np.float32)


def _a_law_values() -> Array:
    code = np.arange(256, dtype=np.uint8) ^ 0x55
    exponent, mantissa = (code >> 4 & 7).astype(int), (code & 15).astype(int)
    steep = (2 * mantissa + 33) << np.maximum(exponent - 1, 0)
    magnitude = np.where(exponent, steep, 2 * mantissa + 1)
    return np.asarray(np.where(code & 0x80, magnitude, -magnitude) / 2**12, np.float32)


_MU_LAW_VALUES, _A_LAW_VALUES = _mu_law_values(), _a_law_values()
