"""Round-to-nearest weight quantisation of experts: the same bytes on every machine.

int8   one scale per row, max |w| / 127, held in float32
int4   one scale per group of a row, max |w| / 7, held in float16

A weight is rounded against the scale as stored, ties to even, so rounding the scale costs half a
step at most. A row or group of zeros has scale 0. No data is looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from deeptalk_edge.bundle.expert_record import Array, ExpertWeights, RecordFormat, to_bfloat16

_FLOAT16_MAX = 65504.0
_BFLOAT16_MAX = 3.3895313892515355e38


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
        return _with_scales(quantise_int8(gate_up), quantise_int8(down))
    if record_format.group is not None:
        group = record_format.group
        return _with_scales(quantise_int4(gate_up, group), quantise_int4(down, group))
    return ExpertWeights(_rounded(gate_up, record_format), _rounded(down, record_format))


def quantise_int8(weights: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """(N, K) float to int8 (N, K) and scales (N, 1).

    Raises ValueError if a weight is not finite.
    """
    values = _finite(weights)
    # float64 holds max |w| / 127 exactly enough that float32 rounds it once.
    scales = (np.abs(values).max(axis=1, keepdims=True, initial=0.0) / 127.0).astype(np.float32)
    return _quantised(values, scales, 127), scales


def quantise_int4(
    weights: Array, group: int
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """(N, K) float to int8 in -7 to 7, (N, K), and scales (N, K / group).

    Raises ValueError if a weight is not finite, a row is not whole groups, or a scale is beyond
    float16.
    """
    values = _finite(weights)
    rows, columns = values.shape
    if columns % group:
        raise ValueError(f"rows of {columns} weights are not whole groups of {group}")
    groups = values.reshape(rows, columns // group, group)
    exact = np.abs(groups).max(axis=2, initial=0.0) / 7.0
    if exact.size and exact.max() > _FLOAT16_MAX:
        raise ValueError(
            f"a weight of {exact.max() * 7.0:.4g} needs an int4 scale beyond float16; use int8"
        )
    scales = exact.astype(np.float16)
    return _quantised(groups, scales[:, :, None], 7).reshape(rows, columns), scales


def _quantised(values: Array, scales: Array, limit: int) -> npt.NDArray[np.int8]:
    """Round `values / scales`; a scale of zero stands for a row too small to be told from zero."""
    steps = scales.astype(np.float64)
    quotients = np.divide(values, steps, out=np.zeros_like(values), where=steps > 0)
    return np.clip(np.rint(quotients), -limit, limit).astype(np.int8)


def _finite(weights: Array) -> npt.NDArray[np.float64]:
    if weights.ndim != 2:
        raise ValueError(f"weights: expected a matrix (N, K), found shape {weights.shape}")
    if not np.isfinite(weights).all():
        raise ValueError("weights hold NaN or infinity; the checkpoint is damaged")
    return weights.astype(np.float64)


def _rounded(weights: Array, record_format: RecordFormat) -> npt.NDArray[Any]:
    values = _finite(weights)
    largest = {"float16": _FLOAT16_MAX, "bfloat16": _BFLOAT16_MAX}.get(record_format.dtype)
    if largest is not None and values.size and np.abs(values).max() > largest:
        raise ValueError(
            f"a weight of {np.abs(values).max():.4g} does not fit {record_format.dtype} records"
        )
    if record_format.dtype == "bfloat16":
        return to_bfloat16(weights)
    return weights.astype(record_format.dtype)


def _with_scales(gate_up: tuple[Array, Array], down: tuple[Array, Array]) -> ExpertWeights:
    return ExpertWeights(gate_up[0], down[0], gate_up[1], down[1])
