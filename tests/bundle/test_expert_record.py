"""The packed expert record keeps every weight, in the layout that notes and kernels expect."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeptalk_edge.bundle.expert_record import (
    PAGE_BYTES,
    ExpertDtype,
    ExpertWeights,
    RecordFormat,
    from_bfloat16,
    pack_int4,
    to_bfloat16,
    unpack_int4,
)
from deeptalk_edge.errors import ArtifactError
from tests.specs import RECORD_KINDS


def random_weights(record_format: RecordFormat, seed: int) -> ExpertWeights:
    rng = np.random.default_rng(seed)
    arrays = {}
    for name, section in record_format.sections.items():
        rows, columns = section.shape
        if record_format.dtype == "int4" and not name.endswith("_scales"):
            arrays[name] = rng.integers(-8, 8, (rows, 2 * columns)).astype(np.int8)
        elif section.dtype.kind == "f":
            arrays[name] = rng.standard_normal((rows, columns)).astype(section.dtype)
        else:
            info = np.iinfo(section.dtype)
            drawn = rng.integers(info.min, info.max, (rows, columns), endpoint=True)
            arrays[name] = drawn.astype(section.dtype)
    return ExpertWeights(**arrays)


@pytest.mark.parametrize(
    ("dtype", "group", "pages"),
    [
        ("float32", None, 8448),
        ("float16", None, 4224),
        ("bfloat16", None, 4224),
        ("int8", None, 2112 + 5),  # 4,864 row scales of 4 bytes are 4.75 pages
        ("int4", 32, 1188),
        ("int4", 64, 1122),
        ("int4", 128, 1089),
    ],
)
def test_a_full_size_record_has_the_pages_of_the_paging_note(
    dtype: ExpertDtype, group: int | None, pages: int
) -> None:
    record_format = RecordFormat(dtype=dtype, group=group, width=2048, ffn_width=1408)
    assert record_format.record_bytes == pages * PAGE_BYTES


def test_the_full_size_int4_record_wastes_no_byte_on_padding() -> None:
    record_format = RecordFormat(dtype="int4", group=64, width=2048, ffn_width=1408)
    assert record_format.sections["down_scales"].end == record_format.record_bytes == 4_595_712


@pytest.mark.parametrize(("dtype", "group"), RECORD_KINDS)
@given(groups=st.tuples(st.integers(1, 3), st.integers(1, 3)), seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_unpacking_returns_what_was_packed(
    dtype: ExpertDtype, group: int | None, groups: tuple[int, int], seed: int
) -> None:
    step = group or 16
    width, ffn_width = groups[0] * step, groups[1] * step
    record_format = RecordFormat(dtype=dtype, group=group, width=width, ffn_width=ffn_width)
    weights = random_weights(record_format, seed)
    record = record_format.pack(weights)
    found = record_format.unpack(record)
    for name in record_format.sections:
        np.testing.assert_array_equal(getattr(found, name), getattr(weights, name))
    assert record.tobytes() == record_format.pack(weights).tobytes()


@pytest.mark.parametrize(("dtype", "group"), RECORD_KINDS)
def test_sections_neither_overlap_nor_leave_an_unaligned_row(
    dtype: ExpertDtype, group: int | None
) -> None:
    record_format = RecordFormat(dtype=dtype, group=group, width=2048, ffn_width=1408)
    end = 0
    for name, section in record_format.sections.items():
        assert end <= section.offset
        assert section.offset % 16 == 0
        if not name.endswith("_scales"):
            assert section.shape[1] * section.dtype.itemsize % 16 == 0
        end = section.end
    record = record_format.pack(random_weights(record_format, 1))
    assert not record[end:].any()


def test_the_int4_byte_is_sixteen_odd_plus_even_plus_eight() -> None:
    pairs = np.array([[even, odd] for even in range(-8, 8) for odd in range(-8, 8)], np.int8)
    packed = pack_int4(pairs)
    expected = 16 * pairs[:, 1].astype(int) + pairs[:, 0].astype(int) + 8
    np.testing.assert_array_equal(packed[:, 0].astype(int), expected)
    np.testing.assert_array_equal(unpack_int4(packed), pairs)
    # The form for graphs without integer shifts.
    floor = np.floor(packed.astype(np.float32) / 16)
    np.testing.assert_array_equal(floor[:, 0], pairs[:, 1])
    np.testing.assert_array_equal((packed - 16 * floor - 8)[:, 0], pairs[:, 0])


@given(
    st.lists(
        st.floats(-(2.0**127), 2.0**127, allow_nan=False, allow_infinity=False, width=32),
        min_size=1,
    )
)
@settings(deadline=None)
def test_bfloat16_is_the_nearest_of_its_neighbours(values: list[float]) -> None:
    exact = np.array(values, np.float32)
    bits = to_bfloat16(exact)
    error = np.abs(from_bfloat16(bits).astype(np.float64) - exact)
    for neighbour in (bits + np.uint16(1), bits - np.uint16(1)):
        other = from_bfloat16(neighbour).astype(np.float64)
        other_error = np.where(np.isfinite(other), np.abs(other - exact), np.inf)
        assert (error <= other_error).all()


def test_dequantised_int4_is_integer_times_scale() -> None:
    record_format = RecordFormat(dtype="int4", group=64, width=128, ffn_width=64)
    weights = random_weights(record_format, 3)
    gate_up, down = record_format.dequantise(weights)
    scales = weights.gate_up_scales
    assert scales is not None
    assert gate_up[5, 70] == np.float32(weights.gate_up[5, 70]) * np.float32(scales[5, 1])
    assert down.shape == (128, 64)


@pytest.mark.parametrize(
    ("dtype", "group", "width", "found"),
    [
        ("int4", None, 128, "needs a group"),
        ("int4", 16, 128, "needs a group"),
        ("int8", 64, 128, "needs a group"),
        ("int4", 128, 192, "width = 192"),
        ("float16", None, 40, "width = 40"),
        ("float16", None, 0, "width = 0"),
        ("int2", None, 128, "expected one of"),
    ],
)
def test_a_format_that_no_kernel_reads_is_refused(
    dtype: ExpertDtype, group: int | None, width: int, found: str
) -> None:
    with pytest.raises(ValueError, match=found):
        RecordFormat(dtype=dtype, group=group, width=width, ffn_width=128)


def _without_scales(weights: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(weights.gate_up, weights.down)


def _transposed(weights: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(
        weights.gate_up.T, weights.down, weights.gate_up_scales, weights.down_scales
    )


def _in_int16(weights: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(
        weights.gate_up.astype(np.int16), weights.down, weights.gate_up_scales, weights.down_scales
    )


@pytest.mark.parametrize("damage", [_without_scales, _transposed, _in_int16])
@pytest.mark.parametrize(("dtype", "group"), [("int8", None), ("int4", 64)])
def test_pack_refuses_arrays_of_another_kind(
    dtype: ExpertDtype, group: int | None, damage: object
) -> None:
    record_format = RecordFormat(dtype=dtype, group=group, width=128, ffn_width=128)
    assert callable(damage)
    with pytest.raises(ValueError, match="expected"):
        record_format.pack(damage(random_weights(record_format, 0)))


def test_pack_refuses_scales_that_would_be_dropped() -> None:
    record_format = RecordFormat(dtype="float32", width=16, ffn_width=16)
    weights = random_weights(record_format, 0)
    scales: npt.NDArray[np.float32] = np.ones((32, 1), np.float32)
    with pytest.raises(ValueError, match="no scales"):
        record_format.pack(ExpertWeights(weights.gate_up, weights.down, scales))


def test_pack_refuses_int4_out_of_range() -> None:
    with pytest.raises(ValueError, match="-8 to 7"):
        pack_int4(np.array([[0, 8]], np.int8))


def test_unpack_refuses_a_short_record() -> None:
    record_format = RecordFormat(dtype="float32", width=16, ffn_width=16)
    with pytest.raises(ArtifactError, match="export the bundle again"):
        record_format.unpack(np.zeros(record_format.record_bytes - 1, np.uint8))
