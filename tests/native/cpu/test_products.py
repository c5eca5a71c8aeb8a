"""Linear layers and experts of every kernel path against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import ExpertDtype, RecordFormat, pack_int4
from deeptalk_edge.errors import BackendError
from deeptalk_edge.runtime.backends.cpu.library import CpuContext, CpuLibrary, Matrix, Span
from deeptalk_edge.runtime.backends.cpu.weights import record_of
from tests.native.cpu.references import expert, random_records, rounded, stored, stored_as, table_of

Array = NDArray[Any]

EXACT = 2e-6  # relative to the sum of all magnitudes: float32 sums of exact products
FLIPPED = 4e-3  # relative to the result's norm: a hidden value at a tie may round the other way

FORMS: list[tuple[ExpertDtype, int | None, int, int]] = [
    ("int8", None, 208, 112),  # both end within a step of every instruction set
    ("int8", None, 128, 256),
    ("int4", 32, 96, 160),
    ("int4", 64, 192, 320),
    ("int4", 128, 384, 128),
    ("int4", 32, 64, 2912),  # more rows than a panel has
]

shapes = given(
    group=st.sampled_from([0, 32, 64, 128]),
    num_rows=st.integers(1, 150),
    num_steps=st.integers(1, 12),
    is_wide=st.booleans(),
    num_tokens=st.integers(1, 9),
    heads=st.integers(1, 3),
    seed=st.integers(0, 1 << 32),
)
bounded = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def assert_linear(context: CpuContext, weights: Array, group: int, x: Array, heads: int) -> None:
    matrix = stored(weights, group)
    by_head = rounded(x.reshape(len(x), heads, -1))
    values = matrix.values.reshape(heads, -1, weights.shape[1])
    expected = np.einsum("thk,hnk->thn", by_head, values).reshape(len(x), -1)
    magnitude = np.einsum("thk,hnk->thn", abs(by_head), abs(values)).reshape(len(x), -1)
    found = context.linear(matrix.native, x, heads=heads)
    assert (np.abs(found - expected) <= EXACT * magnitude + 1e-37).all()


@shapes
@bounded
def test_a_linear_layer_is_its_matrix_times_rounded_activations(
    context: CpuContext,
    group: int,
    num_rows: int,
    num_steps: int,
    is_wide: bool,
    num_tokens: int,
    heads: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    columns = num_steps * (group or 13) + is_wide * 1024  # int8 rows may end anywhere
    weights = rng.standard_normal((heads * num_rows, columns)).astype(np.float32)
    x = rng.standard_normal((num_tokens, heads * columns)).astype(np.float32)
    assert_linear(context, weights, group, x, heads)


@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-33, 1e-20, 1e15])
def test_activations_of_any_size_keep_their_precision(
    context: CpuContext, group: int, size: float
) -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((19, 256)).astype(np.float32)
    x = (rng.standard_normal((2, 256)) * size).astype(np.float32)
    assert_linear(context, weights, group, x, 1)


@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("num_groups", [3, 35])  # fewer columns than 1024, and more
def test_a_row_has_the_same_bits_alone_and_among_others(
    context: CpuContext, group: int, num_groups: int
) -> None:
    rng = np.random.default_rng(2)
    columns = num_groups * (group or 32)
    matrix = stored(rng.standard_normal((37, columns)).astype(np.float32), group)
    x = rng.standard_normal((11, columns)).astype(np.float32)
    alone = np.concatenate([context.linear(matrix.native, row[None]) for row in x])
    for count in range(2, 12):
        np.testing.assert_array_equal(context.linear(matrix.native, x[:count]), alone[:count])


@pytest.mark.parametrize("scale", [0.0, 6e-8, 3e-5, 65504.0])
def test_int4_scales_may_be_zero_subnormal_or_huge(context: CpuContext, scale: float) -> None:
    rng = np.random.default_rng(1)
    steps = rng.integers(-8, 8, (20, 192)).astype(np.int8)
    scales = np.full((20, 3), scale, np.float16)
    values = steps * np.repeat(scales.astype(np.float64), 64, axis=1)
    matrix = stored_as(pack_int4(steps), scales, values, 64)
    x = rng.standard_normal((3, 192)).astype(np.float32)
    expected = rounded(x) @ values.T
    magnitude = abs(rounded(x)) @ abs(values).T
    found = context.linear(matrix.native, x)
    assert (np.abs(found - expected) <= EXACT * magnitude).all()


def test_the_extremes_of_int8_do_not_overflow(context: CpuContext) -> None:
    steps = np.full((17, 300), -128, np.int8)
    scales = np.ones((17, 1), np.float32)
    matrix = stored_as(steps, scales, steps.astype(np.float64), 0)
    for sign in (1, -1):
        x = np.full((1, 300), sign * 127, np.float32)
        found = context.linear(matrix.native, x)
        np.testing.assert_array_equal(found, np.full((1, 17), -128 * 127 * 300 * sign))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 127, 128, 200])
@pytest.mark.parametrize("group", [0, 32])
def test_an_activation_that_is_not_finite_is_refused(
    context: CpuContext, value: float, place: int, group: int
) -> None:
    weights = np.ones((16, 224), np.float32)
    x = np.ones((3, 224), np.float32)
    x[1, place] = value
    with pytest.raises(BackendError, match="NaN or infinite"):
        context.linear(stored(weights, group).native, x)


@pytest.mark.parametrize(
    ("rows", "columns", "group", "message"),
    [
        (16, 64, 48, "group = 48"),
        (16, 96, 64, "columns = 96, expected whole groups"),
        (16, 1 << 15, 0, "columns = 32768"),
        (15, 64, 0, "rows = 15, expected a multiple of the number of heads"),
        (0, 64, 0, "rows = 0"),
    ],
)
def test_sizes_that_kernels_do_not_take_are_refused(
    library: CpuLibrary, rows: int, columns: int, group: int, message: str
) -> None:
    context = CpuContext(library)
    matrix = Matrix(Span(), Span(), rows, columns, group)
    with pytest.raises(ValueError, match=message):
        context.linear(matrix, np.zeros((1, 2 * columns), np.float32), heads=2)


def test_arrays_of_another_shape_are_refused(library: CpuLibrary) -> None:
    matrix = stored(np.ones((16, 64), np.float32), 0)
    with pytest.raises(ValueError, match=r"expected dense float32 \(2, 64\)"):
        CpuContext(library).linear(matrix.native, np.zeros((2, 65), np.float32))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 70])
def test_experts_are_the_weighted_sum_of_their_mlps(
    context: CpuContext, form: tuple[ExpertDtype, int | None, int, int], num_tokens: int
) -> None:
    dtype, group, width, ffn_width = form
    records = RecordFormat(dtype=dtype, group=group, width=width, ffn_width=ffn_width)
    rng = np.random.default_rng(num_tokens)
    packed, matrices = random_records(records, 7, rng)
    table = np.array([record.ctypes.data for record in packed], np.uint64)
    x = rng.standard_normal((num_tokens, width)).astype(np.float32)
    ids = np.stack([rng.permutation(5)[:3] for _ in range(num_tokens)])
    weights = rng.random((num_tokens, 3)).astype(np.float32)
    before = rng.standard_normal((num_tokens, width)).astype(np.float32)
    found = before.copy()
    context.add_experts(
        record_of(records), table_of(table, records), x, ids, weights, found, num_own=2
    )
    expected = before.astype(np.float64)
    for token in range(num_tokens):
        chosen = [*zip(ids[token], weights[token], strict=True), (5, 1.0), (6, 1.0)]
        expected[token] += sum(w * expert(matrices[e], x[token]) for e, w in chosen)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected - before)
    assert error < FLIPPED


def test_neither_threads_nor_grouping_change_a_bit(library: CpuLibrary) -> None:
    records = RecordFormat(dtype="int4", group=64, width=192, ffn_width=320)
    rng = np.random.default_rng(3)
    packed, _ = random_records(records, 6, rng)
    table = np.array([record.ctypes.data for record in packed], np.uint64)
    x = rng.standard_normal((40, 192)).astype(np.float32)
    ids = np.stack([rng.permutation(6)[:2] for _ in range(40)])
    weights = rng.random((40, 2)).astype(np.float32)
    together = np.zeros((40, 192), np.float32)
    CpuContext(library, threads=3).add_experts(
        record_of(records), table_of(table, records), x, ids, weights, together
    )
    alone = np.zeros_like(together)
    single = CpuContext(library)
    for t in range(40):
        part = slice(t, t + 1)
        single.add_experts(
            record_of(records),
            table_of(table, records),
            x[part],
            ids[part],
            weights[part],
            alone[part],
        )
    np.testing.assert_array_equal(together, alone)


def test_a_choice_of_weight_0_needs_no_expert(library: CpuLibrary) -> None:
    records = RecordFormat(dtype="int8", width=32, ffn_width=16)
    packed, _ = random_records(records, 2, np.random.default_rng(5))
    table = np.array([packed[0].ctypes.data, 0], np.uint64)
    x = np.ones((1, 32), np.float32)
    context = CpuContext(library)
    one, two = np.zeros_like(x), np.zeros_like(x)
    for ids, weights, y in (([[0, 1]], [[0.5, 0.0]], one), ([[0]], [[0.5]], two)):
        chosen = np.array(ids), np.array(weights, np.float32)
        context.add_experts(record_of(records), table_of(table, records), x, *chosen, y)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("chosen", "message"), [(1, "not in its table"), (4, "outside its table"), (-1, "outside")]
)
def test_an_absent_or_unknown_expert_is_refused(
    library: CpuLibrary, chosen: int, message: str
) -> None:
    records = RecordFormat(dtype="int8", width=32, ffn_width=16)
    packed, _ = random_records(records, 4, np.random.default_rng(4))
    table = np.array([record.ctypes.data for record in packed], np.uint64)
    table[1] = 0
    x, weights = np.ones((1, 32), np.float32), np.ones((1, 1), np.float32)
    ids = np.array([[chosen]])
    with pytest.raises(BackendError, match=message):
        CpuContext(library).add_experts(
            record_of(records), table_of(table, records), x, ids, weights, x.copy()
        )
