"""The kernels' computations in float64: activations rounded to int8, everything else exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import RecordFormat, pack_int4
from deeptalk_edge.calibration.quantise import quantise_expert, quantise_int4, quantise_int8
from deeptalk_edge.runtime.backends.cpu.library import Matrix, Table, span

Array = NDArray[Any]

ACTIVATION_BLOCK = 128  # activations per scale


def rounded(x: Array) -> NDArray[np.float64]:
    """Activations (..., K) after the kernels' rounding."""
    values = np.asarray(x, np.float32)
    out = np.zeros(values.shape)
    for start in range(0, values.shape[-1], ACTIVATION_BLOCK):
        block = values[..., start : start + ACTIVATION_BLOCK]
        largest = np.abs(block).max(axis=-1, keepdims=True)
        is_zero = largest < 1e-30
        inverse = np.where(is_zero, 0, np.float32(127) / np.where(is_zero, 1, largest))
        steps = np.rint(block * inverse.astype(np.float32)).astype(np.float64)
        scale = (largest / np.float32(127)).astype(np.float64)
        out[..., start : start + ACTIVATION_BLOCK] = steps * scale
    return out


@dataclass
class StoredMatrix:
    """A matrix in the kernels' layout, and its values."""

    native: Matrix
    values: NDArray[np.float64]
    arrays: tuple[Array, Array]  # keeps the memory of `native` alive


def stored(weights: Array, group: int) -> StoredMatrix:
    """Quantise (N, K) float32; group 0 is int8."""
    if group:
        steps, scales = quantise_int4(weights, group)
        packed: Array = pack_int4(steps)
        values = steps * np.repeat(scales.astype(np.float64), group, axis=1)
    else:
        packed, wide = quantise_int8(weights)
        scales = wide  # type: ignore[assignment]
        values = packed * wide.astype(np.float64)
    return stored_as(packed, scales, values, group)


def stored_as(packed: Array, scales: Array, values: Array, group: int) -> StoredMatrix:
    rows, columns = values.shape
    native = Matrix(span(packed), span(scales), rows, columns, group)
    return StoredMatrix(native, values.astype(np.float64), (packed, scales))


def random_records(
    form: RecordFormat, count: int, rng: np.random.Generator
) -> tuple[list[Array], list[tuple[Array, Array]]]:
    """Packed experts, and the values of their matrices."""
    records, matrices = [], []
    for _ in range(count):
        gate_up = rng.standard_normal((2 * form.ffn_width, form.width)) * form.width**-0.5
        down = rng.standard_normal((form.width, form.ffn_width)) * form.ffn_width**-0.5
        weights = quantise_expert(form, gate_up.astype(np.float32), down.astype(np.float32))
        # Exactly the content, so that a read beyond it is outside of the allocation.
        records.append(form.pack(weights)[: form.content_bytes].copy())
        matrices.append(form.dequantise(weights))
    return records, matrices


def table_of(addresses: Array, form: RecordFormat) -> Table:
    """The table of records from `random_records`; the caller keeps the addresses."""
    return Table(span(addresses), form.content_bytes)


def expert(matrices: tuple[Array, Array], x: Array) -> NDArray[np.float64]:
    """down(silu(gate x) * up x) for one token (C,), with int8 activations."""
    gate, up = np.split(matrices[0].astype(np.float64) @ rounded(x), 2)
    return matrices[1].astype(np.float64) @ rounded(gate / (1 + np.exp(-gate)) * up)


def attention(queries: Array, rows: Array, latent: int) -> NDArray[np.float64]:
    """queries (H, W) over rows (P, W): mixed latents (H, latent)."""
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    mixed: NDArray[np.float64] = shares / shares.sum(axis=1, keepdims=True) @ rows[:, :latent]
    return mixed
