"""One routed expert: where it lies in the bundle's file, and what it is once read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRecord:
    """Where one expert lies in the file."""

    layer: int
    expert: int
    offset: int
    bytes: int
    crc32: int


class ExpertWeights(NamedTuple):
    """One expert, read-only."""

    gate_up: Array
    """(2G, C)"""
    down: Array
    """(C, G)"""
