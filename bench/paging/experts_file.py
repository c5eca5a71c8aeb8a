"""A file of random experts at full record size."""

from __future__ import annotations

import functools
import os
import zlib
from pathlib import Path

import numpy as np

RECORD_BYTES = 4_595_712
"""One int4 expert of DeepSeek-V2-Lite, groups of 64: 1,122 pages."""

NUM_EXPERTS = 64


def write_experts(path: Path, num_layers: int) -> None:
    """Write random experts; a file of the right size is reused."""
    size_bytes = num_layers * NUM_EXPERTS * RECORD_BYTES
    if path.exists() and path.stat().st_size == size_bytes:
        return
    layer = np.random.default_rng(0).bytes(NUM_EXPERTS * RECORD_BYTES)
    with path.open("wb") as file:
        for _ in range(num_layers):
            file.write(layer)
            os.fsync(file.fileno())
    forget_cache(path)


def forget_cache(path: Path) -> None:
    """Drop all pages of the file from memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@functools.cache
def checksums(path: Path) -> list[int]:
    """Return the checksums of a layer's records."""
    with path.open("rb") as file:
        checksums = [zlib.crc32(file.read(RECORD_BYTES)) for _ in range(NUM_EXPERTS)]
    forget_cache(path)
    return checksums
