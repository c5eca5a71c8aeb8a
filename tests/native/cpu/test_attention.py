"""The latent cache, attention over it, and Snake, on every kernel path against float64."""

from __future__ import annotations

from ctypes import byref
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import from_bfloat16, to_bfloat16
from deeptalk_edge.errors import BackendError
from deeptalk_edge.runtime.backends.cpu.library import (
    CACHE_KINDS,
    CpuContext,
    CpuLibrary,
    Pass,
    Span,
    span,
)
from tests.native.cpu.references import attention

Array = NDArray[Any]

TOLERANCE = {"float": 3e-6, "bfloat16": 6e-3, "int8": 1e-4}
"""Tolerance, relative to the largest value. One path also rounds queries and shares to bfloat16;
shares of int8 rows may have 15 bits."""


def write_rows(context: CpuContext, rows: Array, latent: int, kind: str) -> tuple[Array, Array]:
    """Write rows (P, latent + rope) to a cache; returns the cache and its values."""
    rope = rows.shape[1] - latent
    row_bytes = context.cache_row_bytes(latent, rope, kind)
    cache = np.full(
        (len(rows), row_bytes), 0xFF, np.uint8
    )  # NaN, if it were read before it is written
    for row, place in zip(rows, cache, strict=True):
        where = latent, rope, CACHE_KINDS[kind], span(row), span(place)
        context.run("cache", context.calls.dt_cache_write, context.handle, *where)
    return cache, as_held(rows, latent, kind)


def as_held(values: Array, latent: int, kind: str) -> Array:
    """Values of rows (..., latent + rope) in a cache; queries of int8 rows are int8, too."""
    if kind == "bfloat16":
        return from_bfloat16(to_bfloat16(values))
    parts = []
    for part in np.split(values, [latent], axis=-1):
        largest = np.abs(part).max(axis=-1, keepdims=True)
        inverse = np.where(largest > 0, np.float32(127) / np.where(largest > 0, largest, 1), 0)
        parts.append(np.rint(part * inverse.astype(np.float32)) * (largest / np.float32(127)))
    return np.concatenate(parts, axis=-1)


def expected_of(queries: Array, values: Array, latent: int, kind: str) -> Array:
    """Attention of queries (H, W) to a cache's values (P, W)."""
    if kind == "int8":
        queries = as_held(queries, latent, kind)
    return attention(queries, values, latent)


def attend(
    context: CpuContext,
    caches: list[Array],
    queries: Array,
    latent: int,
    kind: str,
    *,
    position: int,
    num_shared: int = 0,
) -> Array:
    """queries (B, T, H, latent + rope), rows [0, position + T) of every cache being written."""
    num_items, num_rows, heads, width = queries.shape
    own = [span(cache) for cache in caches]
    where = Pass(own[0], (Span * 2)(*own), num_items, num_rows, position, num_shared)
    mixed = np.empty((num_items, num_rows, heads, latent), np.float32)
    context.run(
        "attend",
        context.calls.dt_attend,
        context.handle,
        heads,
        latent,
        width - latent,
        CACHE_KINDS[kind],
        byref(where),
        span(np.ascontiguousarray(queries)),
        span(mixed),
    )
    return mixed


def tolerance(context: CpuContext, kind: str) -> float:
    rounding_paths = {
        "bfloat16": ["avx512-bf16"],
        "int8": ["avx512-bf16", "avx512", "avx512-intel"],
    }
    return TOLERANCE[kind if context.path in rounding_paths[kind] else "float"]


@pytest.mark.parametrize("kind", CACHE_KINDS)
@given(
    heads=st.integers(1, 20),
    latent=st.integers(1, 70),
    rope=st.integers(1, 20).map(lambda half: 2 * half),
    position=st.integers(0, 90),
    num_rows=st.integers(1, 5),
    seed=st.integers(0, 1 << 32),
)
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_attention_is_softmax_over_the_cache(
    context: CpuContext,
    kind: str,
    heads: int,
    latent: int,
    rope: int,
    position: int,
    num_rows: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    end = position + num_rows
    rows = rng.standard_normal((end, latent + rope)).astype(np.float32)
    queries = rng.standard_normal((1, num_rows, heads, latent + rope)).astype(np.float32)
    queries *= (latent + rope) ** -0.5
    cache, values = write_rows(context, rows, latent, kind)
    found = attend(context, [cache], queries, latent, kind, position=position)
    for row in range(num_rows):
        expected = expected_of(queries[0, row], values[: position + row + 1], latent, kind)
        np.testing.assert_allclose(
            found[0, row], expected, rtol=0, atol=tolerance(context, kind) * np.abs(values).max()
        )


@pytest.mark.parametrize("kind", CACHE_KINDS)
def test_long_caches_are_gathered_in_parts(context: CpuContext, kind: str) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1300, 80)).astype(np.float32)
    queries = rng.standard_normal((1, 1, 16, 80)).astype(np.float32)
    queries *= 3  # a few rows take most of the softmax, in parts that differ by head
    cache, values = write_rows(context, rows, 64, kind)
    found = attend(context, [cache], queries, 64, kind, position=1299)
    expected = expected_of(queries[0, 0], values, 64, kind)
    np.testing.assert_allclose(found[0, 0], expected, atol=8 * tolerance(context, kind))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_neither_threads_nor_the_order_of_feeding_change_a_bit(
    library: CpuLibrary, threads: int
) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((600, 80)).astype(np.float32)
    queries = rng.standard_normal((1, 40, 5, 80)).astype(np.float32)
    context = CpuContext(library, threads=threads)
    cache, _ = write_rows(context, rows, 64, "bfloat16")
    together = attend(context, [cache], queries, 64, "bfloat16", position=560)
    single = CpuContext(library)
    for row in range(40):
        part = queries[:, row : row + 1]
        alone = attend(single, [cache], part, 64, "bfloat16", position=560 + row)
        np.testing.assert_array_equal(alone[0, 0], together[0, row])


@pytest.mark.parametrize("num_shared", [0, 1, 37, 64, 99])
def test_a_forked_item_reads_what_it_shares(library: CpuLibrary, num_shared: int) -> None:
    rng = np.random.default_rng(2)
    context = CpuContext(library)
    rows = rng.standard_normal((2, 100, 48)).astype(np.float32)
    rows[1, :num_shared] = rows[0, :num_shared]
    caches = [write_rows(context, item, 32, "bfloat16")[0] for item in rows]
    queries = rng.standard_normal((2, 1, 3, 48)).astype(np.float32)
    expected = attend(context, caches, queries, 32, "bfloat16", position=99)
    caches[1][:num_shared] = 0xFF  # NaN: must not be read
    found = attend(context, caches, queries, 32, "bfloat16", position=99, num_shared=num_shared)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", CACHE_KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_never_enters_the_cache(
    library: CpuLibrary, kind: str, value: float
) -> None:
    row = np.ones((1, 80), np.float32)
    row[0, 70] = value
    with pytest.raises(BackendError, match="NaN or infinite"):
        write_rows(CpuContext(library), row, 64, kind)


def test_a_cache_row_beyond_the_kernels_width_is_refused(library: CpuLibrary) -> None:
    rows = np.ones((1, 1100), np.float32)
    with pytest.raises(ValueError, match="width of a cached row = 1100"):
        write_rows(CpuContext(library), rows, 1000, "bfloat16")


@pytest.mark.parametrize("samples", [1, 15, 16, 333])
@pytest.mark.parametrize("size", [0.0, 1.0, 300.0])
def test_snake_is_its_formula(context: CpuContext, samples: int, size: float) -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((6, samples)) * size).astype(np.float32)
    alpha = np.array([1e-3, 0.1, 1.0, 3.0, 10.0, 0.5], np.float32)
    wide = alpha[:, None].astype(np.float64)
    expected = x + np.sin(wide * x) ** 2 / wide
    # An angle of 3,000 is known to 1e-4 in float32.
    np.testing.assert_allclose(
        context.snake(x, alpha), expected, rtol=2e-6, atol=1e-6 + 3e-7 * size
    )
