"""GPTQ: each column's rounding error is passed on to the columns that are not rounded yet.

    H = X^T X + damping          inputs X (T, K), weights (N, K)
    w_j -= (w_i - q_i) / U_ii * U_ij   for j > i, U the upper Cholesky factor of H^-1

The scales of a group are chosen, clipped, when its first column is reached, from the weights as
they are by then. Source: GPTQ (arXiv 2210.17323), algorithm 1, without its column order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from deeptalk_edge.calibration.quantise import check_finite
from deeptalk_edge.calibration.ranges.clipping import clipped

Array = npt.NDArray[Any]

_BLOCK = 128  # columns between two updates of all that are left
_DAMPING = 0.01  # of the mean diagonal, as published


def error_feedback(
    weights: Array, limit: int, group: int, gram: Array
) -> tuple[npt.NDArray[np.int8], Array]:
    """(N, K) to integers (N, K) and scales (N, K / group), `gram` (K, K) that of the inputs.

    Raises ValueError as round-to-nearest does, or if the Gram matrix is not finite.
    """
    check_finite(weights)
    rows, columns = weights.shape
    upper = _inverse_factor(gram)
    left = weights.astype(np.float32).copy()
    integers = np.empty((rows, columns), np.int8)
    scales = np.empty((rows, columns // group), np.float32 if limit == 127 else np.float16)
    if group == columns:  # one scale a row: it cannot wait for the last column
        scales[:] = clipped(weights, limit, group)[1]
    block = group if group < columns and group >= _BLOCK else _BLOCK
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = np.empty((rows, stop - start), np.float32)
        for column in range(start, stop):
            if group < columns and column % group == 0:
                whole = slice(column, column + group)
                scales[:, column // group] = clipped(left[:, whole], limit, group)[1][:, 0]
            scale = scales[:, column // group].astype(np.float32)
            chosen = np.clip(np.rint(left[:, column] / scale), -limit, limit)
            integers[:, column] = chosen
            off = left[:, column] - chosen * scale
            error = off / upper[column, column]
            left[:, column:stop] -= error[:, None] * upper[column, column:stop]
            errors[:, column - start] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return integers, scales


def _inverse_factor(gram: Array) -> npt.NDArray[np.float32]:
    """U (K, K), upper, with U^T U = H^-1; more damping where H is not definite."""
    damped = gram.astype(np.float64)
    if not np.isfinite(damped).all():
        raise ValueError("the inputs' Gram matrix holds NaN or infinity")
    diagonal = np.diag(damped).copy()
    diagonal[diagonal == 0] = 1.0  # an input that is always zero moves nothing
    mean = float(diagonal.mean())
    for factor in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):
        np.fill_diagonal(damped, diagonal + factor * mean)
        try:
            lower = np.linalg.cholesky(damped[::-1, ::-1])
            break
        except np.linalg.LinAlgError:
            continue
    else:
        raise ValueError("the inputs' Gram matrix is not positive; record more speech")
    # H reversed = L L^T gives H = V V^T with V upper, so H^-1 = (V^-1)^T (V^-1) and V^-1 is upper.
    upper = np.linalg.inv(lower[::-1, ::-1])
    return np.asarray(np.triu(upper), np.float32)
