"""Weights to int8 and int4 against given scales, or against round-to-nearest ones.

int8   one scale per row, max |w| / 127, held in float32
int4   one scale per group of a row, max |w| / 7, held in float16

A weight is rounded against the scale as stored, ties to even, so rounding the scale costs half a
step at most. A scale is never zero, infinite or NaN: a row or group of zeros has scale 1, and one
too small for its type takes the smallest scale above zero. Data plays no part here; the methods in
ranges/ choose other scales from it. The bytes do not depend on the machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from deeptalk_edge.bundle.expert_record import Array, ExpertWeights, RecordFormat, to_bfloat16

_FLOAT16_MAX = 65504.0
_BFLOAT16_MAX = 3.3895313892515355e38
_LEAST_SCALE = {np.float16: 2.0**-24, np.float32: 2.0**-126}
_BLOCK_WEIGHTS = 1 << 18
"""Quantised at once: float64 copies of more do not stay in a core's cache (2.1 times slower)."""


def quantise_expert(record_format: RecordFormat, gate_up: Array, down: Array) -> ExpertWeights:
    """Bring one expert's float32 matrices, (2G, C) and (C, G), to the precision of the records.

    Raises ValueError if a matrix has another shape, is not finite or cannot be held.
    """
    sizes = {
        "gate_up": (2 * record_format.ffn_width, record_format.width),
        "down": (record_format.width, record_format.ffn_width),
    }
    for (name, shape), matrix in zip(sizes.items(), (gate_up, down), strict=True):
        if matrix.shape != shape:
            raise ValueError(f"{name} of an expert: expected {shape}, found {matrix.shape}")
    if record_format.dtype == "int8":
        return with_scales(quantise_int8(gate_up), quantise_int8(down))
    if record_format.group is not None:
        group = record_format.group
        return with_scales(quantise_int4(gate_up, group), quantise_int4(down, group))
    return ExpertWeights(_rounded(gate_up, record_format), _rounded(down, record_format))


def quantise_int8(weights: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """(N, K) float to int8 (N, K) and scales (N, 1).

    Raises ValueError if a weight is not finite.
    """
    check_finite(weights)
    scales = stored_scales(largest(weights, weights.shape[1]) / 127.0, np.float32)
    return rounded_against(weights, scales, 127), scales


def quantise_int4(
    weights: Array, group: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """(N, K) float to int8 in -7 to 7, (N, K), and scales (N, K / group).

    Raises ValueError if a weight is not finite, a row is not whole groups, or a scale is beyond
    float16.
    """
    check_finite(weights)
    scales = stored_scales(largest(weights, group) / 7.0, np.float16)
    return rounded_against(weights, scales, 7), scales


def largest(weights: Array, group: int) -> npt.NDArray[np.float64]:
    """The largest |w| of each group of a row, (N, K / group), exactly.

    Raises ValueError if a row is not whole groups.
    """
    rows, columns = weights.shape
    if columns % group:
        raise ValueError(f"rows of {columns} weights are not whole groups of {group}")
    groups = weights.reshape(rows, columns // group, group)
    most = np.maximum(groups.max(axis=2, initial=0.0), -groups.min(axis=2, initial=0.0))
    return np.asarray(most, np.float64)


def stored_scales(exact: npt.NDArray[np.float64], dtype: type[Any]) -> npt.NDArray[Any]:
    """Scales as they are stored, float16 or float32.

    Raises ValueError if one is beyond float16.
    """
    if dtype is np.float16 and exact.size and exact.max() > _FLOAT16_MAX:
        raise ValueError(
            f"a weight of {exact.max() * 7.0:.4g} needs an int4 scale beyond float16; use int8"
        )
    least = np.where(exact > 0, _LEAST_SCALE[dtype], 1.0)
    scales: npt.NDArray[Any] = np.maximum(exact, least).astype(dtype)
    return scales


def rounded_against(weights: Array, scales: Array, limit: int) -> npt.NDArray[np.int8]:
    """Weights (N, K) over scales (N, K / group), to the nearest integer in -limit to limit."""
    rows, columns = weights.shape
    integers = np.empty((rows, columns), np.int8)
    block_rows = max(1, _BLOCK_WEIGHTS // max(columns, 1))
    for start in range(0, rows, block_rows):
        part = slice(start, start + block_rows)
        steps = scales[part].astype(np.float64)
        values = weights[part].reshape(*steps.shape, -1) / steps[:, :, None]
        np.rint(values, out=values)
        np.clip(values, -limit, limit, out=values)
        integers[part] = values.reshape(-1, columns)
    return integers


def dequantised(integers: Array, scales: Array) -> npt.NDArray[np.float32]:
    """The values of integers (N, K) with scales (N, K / group), float32."""
    values = integers.reshape(*scales.shape, -1) * scales.astype(np.float32)[:, :, None]
    return np.asarray(values.reshape(integers.shape), np.float32)


def check_finite(weights: Array) -> None:
    """Raises ValueError if this is no matrix of finite numbers."""
    if weights.ndim != 2:
        raise ValueError(f"weights: expected a matrix (N, K), found shape {weights.shape}")
    if not np.isfinite(weights).all():
        raise ValueError("weights hold NaN or infinity; the checkpoint is damaged")


def _rounded(weights: Array, record_format: RecordFormat) -> npt.NDArray[Any]:
    check_finite(weights)
    largest_of = {"float16": _FLOAT16_MAX, "bfloat16": _BFLOAT16_MAX}.get(record_format.dtype)
    if largest_of is not None and weights.size and np.abs(weights).max() > largest_of:
        raise ValueError(
            f"a weight of {np.abs(weights).max():.4g} does not fit {record_format.dtype} records"
        )
    if record_format.dtype == "bfloat16":
        return to_bfloat16(weights)
    return weights.astype(record_format.dtype)


def with_scales(gate_up: tuple[Array, Array], down: tuple[Array, Array]) -> ExpertWeights:
    """Two quantised matrices, each with its scales, as an expert."""
    return ExpertWeights(gate_up[0], down[0], gate_up[1], down[1])
