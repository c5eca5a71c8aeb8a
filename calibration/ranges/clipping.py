"""Scales that clip the largest weights of a group where that lowers the squared error.

MSE        the error of the weights themselves
activation the error of the product: each group's error is weighed by the Gram matrix of its inputs

Every group of every row chooses its own shrink factor from one grid; 1 is round-to-nearest's scale,
so no group is ever worse than that by the measure it was chosen by.
Source: LLM.int8 and AWQ (arXiv 2306.00978), section 3 (`search_best_clip`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from deeptalk_edge.calibration.quantise import (
    check_finite,
    largest,
    rounded_against,
    stored_scales,
)

Array = npt.NDArray[Any]

_SHRINKS = tuple(1.0 - 0.05 * i for i in range(11))  # 1.0 to 0.5, as AWQ
_BLOCK_ROWS = 256


def clipped(
    weights: Array, limit: int, group: int, gram: Array | None = None
) -> tuple[npt.NDArray[np.int8], Array]:
    """(N, K) to integers (N, K) and scales (N, K / group), each group's scale the best of a grid.

    `limit` is 127 or 7. `gram` (K / group, group, group) weighs a group's errors by what its
    inputs are; without it every weight counts alike.

    Raises ValueError as round-to-nearest does.
    """
    check_finite(weights)
    dtype = np.float32 if limit == 127 else np.float16
    exact = largest(weights, group) / limit
    scales = stored_scales(exact, dtype)
    for start in range(0, len(weights), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        scales[part] = _best(weights[part], exact[part], limit, gram, dtype)
    return rounded_against(weights, scales, limit), scales


def grams_of_groups(x: Array, group: int) -> npt.NDArray[np.float32]:
    """X^T X of each group of columns of inputs (T, K): (K / group, group, group)."""
    parts = np.ascontiguousarray(x.reshape(len(x), -1, group).transpose(1, 0, 2))
    return np.asarray(parts.transpose(0, 2, 1) @ parts, np.float32)


def _best(weights: Array, exact: Array, limit: int, gram: Array | None, dtype: type[Any]) -> Array:
    best: Array | None = None
    least = np.full(exact.shape, np.inf)
    for shrink in _SHRINKS:
        scales = stored_scales(exact * shrink, dtype)
        errors = _errors(weights, scales, limit, gram)
        better = errors < least
        least = np.where(better, errors, least)
        best = scales if best is None else np.where(better, scales, best)
    assert best is not None
    return best


def _errors(weights: Array, scales: Array, limit: int, gram: Array | None) -> Array:
    """The squared error of each group, (N, K / group)."""
    groups = weights.reshape(*scales.shape, -1)
    steps = scales.astype(np.float32)[:, :, None]
    off = np.clip(np.rint(groups / steps), -limit, limit) * steps - groups
    if gram is None:
        return np.asarray(np.einsum("ngk,ngk->ng", off, off))
    weighed = np.matmul(off.transpose(1, 0, 2), gram).transpose(1, 0, 2)
    return np.asarray(np.einsum("ngk,ngk->ng", weighed, off))
