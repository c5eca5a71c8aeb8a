"""Scales of input channels that are folded into the layer before: the float model stays the same.

    y = W x = (W s) (x / s)

AWQ          s = (mean |x|)^a, a searched: channels of large inputs keep more of their precision
SmoothQuant  s = max |x|^a / max |w|^(1 - a): what int8 activations cannot hold moves to the weights

Source: AWQ (arXiv 2306.00978), equation 5; SmoothQuant (arXiv 2211.10438), equation 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Scales = npt.NDArray[np.float32]

_STEPS = 10
_LEAST = 1e-4  # of the geometric middle: a channel that is always silent scales nothing to zero


def activation_aware(mean_abs: Array, error_of: Callable[[Scales], float]) -> Scales:
    """AWQ's scales (K,) of inputs whose mean magnitude is (K,); `error_of` measures a candidate.

    The exponents run from 0, which is no scaling, to 1; the least error wins.
    """
    candidates = [normalised(mean_abs ** (step / _STEPS)) for step in range(_STEPS + 1)]
    errors = [error_of(scales) for scales in candidates]
    return candidates[int(np.argmin(errors))]


def smoothing(most_abs: Array, most_weight: Array, exponent: float) -> Scales:
    """SmoothQuant's scales (K,) of inputs up to (K,) that meet weights up to (K,)."""
    inputs, weights = (np.maximum(v.astype(np.float64), 1e-12) for v in (most_abs, most_weight))
    return normalised(inputs**exponent / weights ** (1.0 - exponent))


def normalised(scales: Array) -> Scales:
    """Around 1, and never zero, infinite or NaN."""
    values = np.nan_to_num(scales.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    positive = values[values > 0]
    if not positive.size:
        return np.ones(values.shape, np.float32)
    middle = float(np.exp(np.log(positive).mean()))
    return np.clip(values / middle, _LEAST, 1 / _LEAST).astype(np.float32)
