"""How loud a frame is."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

QUIET_DBFS = -100.0  # what digital silence reads


def level_dbfs(pcm: Array) -> float:
    """The mean level of (N,) against a full-scale square wave, `QUIET_DBFS` at least."""
    power = float(np.dot(pcm, pcm)) / max(len(pcm), 1)
    return max(10 * math.log10(power), QUIET_DBFS) if power else QUIET_DBFS


def peak_dbfs(pcm: Array) -> float:
    """The highest sample of (N,), `QUIET_DBFS` at least."""
    peak = float(np.abs(pcm).max(initial=0.0))
    return max(20 * math.log10(peak), QUIET_DBFS) if peak else QUIET_DBFS
