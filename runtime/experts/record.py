"""The weights of one routed expert."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


class ExpertWeights(NamedTuple):
    """One expert, read-only."""

    gate_up: Array
    """(2G, C)"""
    down: Array
    """(C, G)"""
