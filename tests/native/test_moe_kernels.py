"""The GPU's MoE kernels, compiled for the host, against a float64 reference.

The card runs the same kernels: here coroutines replace threads, and the tensor cores' fragments
have the layout of the PTX manual. This cannot show speed or the card's rounding inside an mma;
`make gpu-check` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeptalk_edge.bench.gpu.moe_library import (
    ActivationDtype,
    MoeCall,
    MoeConfig,
    MoeLibrary,
)
from deeptalk_edge.bundle.expert_record import ExpertDtype, RecordFormat, from_bfloat16, to_bfloat16
from deeptalk_edge.calibration.quantise import quantise_expert
from tests.plugin import built_for_host

Array = npt.NDArray[Any]

POISON = 0xFF  # NaN in every float format

# Widths of whole groups for int4; for other types rows that end inside a chunk.
KINDS: list[tuple[ExpertDtype, int | None, ActivationDtype, int, int]] = [
    ("float16", None, "float16", 208, 112),
    ("bfloat16", None, "bfloat16", 208, 112),
    ("int8", None, "float16", 208, 112),
    ("int8", None, "bfloat16", 112, 80),
    ("int4", 32, "float16", 192, 160),
    ("int4", 32, "bfloat16", 160, 96),
    ("int4", 64, "float16", 192, 64),
    ("int4", 64, "bfloat16", 128, 192),
    ("int4", 128, "float16", 256, 128),
    ("int4", 128, "bfloat16", 128, 256),
]
DECODE, PLANNED, WIDE = 3, 9, 129  # tokens that take the shortest and the longest path


@pytest.fixture(scope="session")
def library() -> MoeLibrary:
    return MoeLibrary(built_for_host())


def config_of(
    kind: tuple[ExpertDtype, int | None, ActivationDtype, int, int],
    num_experts: int = 8,
    top_k: int = 3,
) -> MoeConfig:
    dtype, group, activation, width, ffn_width = kind
    return MoeConfig(
        weight_dtype=dtype,
        group=group,
        activation_dtype=activation,
        width=width,
        ffn_width=ffn_width,
        num_experts=num_experts,
        top_k=top_k,
    )


every_kind = pytest.mark.parametrize(
    "config", [config_of(kind) for kind in KINDS], ids=lambda c: f"{c.weight_dtype}-{c.group}"
)
one_of_each = pytest.mark.parametrize("config", [config_of(KINDS[i]) for i in (1, 2, 6)])


def stored(values: Array, dtype: ActivationDtype) -> Array:
    """Round to the activations' type; returns 16-bit patterns."""
    if dtype == "bfloat16":
        return to_bfloat16(values)
    return values.astype(np.float16).view(np.uint16)


def loaded(bits: Array, dtype: ActivationDtype) -> npt.NDArray[np.float64]:
    if dtype == "bfloat16":
        return from_bfloat16(bits).astype(np.float64)
    return bits.view(np.float16).astype(np.float64)


@dataclass
class Layer:
    """The experts of one layer in shuffled slots of a poisoned arena, and their values."""

    config: MoeConfig
    arena: Array
    slot_table: npt.NDArray[np.int32]
    matrices: list[tuple[Array, Array]]

    def in_other_slots(self, seed: int) -> Layer:
        moved = np.random.default_rng(seed).permutation(len(self.arena))
        arena = np.empty_like(self.arena)
        arena[moved] = self.arena
        resident = self.slot_table >= 0
        table = np.where(resident, moved[np.maximum(self.slot_table, 0)], -1).astype(np.int32)
        return replace(self, arena=arena, slot_table=table)

    def with_only(self, experts: Sequence[int]) -> Layer:
        table = np.full_like(self.slot_table, -1)
        table[list(experts)] = self.slot_table[list(experts)]
        return replace(self, slot_table=table)


@dataclass
class Uses:
    x: Array
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


def random_layer(config: MoeConfig, seed: int = 0, spare_slots: int = 3) -> Layer:
    rng = np.random.default_rng(seed)
    record_format = config.record_format
    num_slots = config.num_experts + spare_slots
    arena = np.full((num_slots, record_format.record_bytes), POISON, np.uint8)
    slots = rng.permutation(num_slots)[: config.num_experts].astype(np.int32)
    end = max(section.end for section in record_format.sections.values())
    matrices = []
    for slot in slots:
        gate_up = rng.standard_normal((2 * config.ffn_width, config.width))
        down = rng.standard_normal((config.width, config.ffn_width))
        weights = quantise_expert(
            record_format,
            (gate_up * config.width**-0.5).astype(np.float32),
            (down * config.ffn_width**-0.5).astype(np.float32),
        )
        arena[slot, :end] = record_format.pack(weights)[:end]
        matrices.append(record_format.dequantise(weights))
    return Layer(config, arena, slots, matrices)


def random_uses(config: MoeConfig, tokens: int, seed: int = 1) -> Uses:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(config.num_experts)[: config.top_k] for _ in range(tokens)])
    x = rng.standard_normal((tokens, config.width)).astype(np.float32)
    weights = rng.random((tokens, config.top_k), np.float32) * 0.3  # they do not sum to 1
    return Uses(stored(x, config.activation_dtype), ids.astype(np.int32), weights)


def guarded(array: Array) -> tuple[Array, Array]:
    """A copy of `array` between poisoned bytes; a read or write outside it shows."""
    size = array.nbytes
    room = np.full(size + 512, POISON, np.uint8)
    room[256 : 256 + size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return room, room[256 : 256 + size].view(array.dtype).reshape(array.shape)


def run(
    library: MoeLibrary,
    layer: Layer,
    uses: Uses,
    *,
    carry: Array | None = None,
    float_out: bool = True,
) -> tuple[Array, int]:
    """Run the layer on poisoned memory; returns `out` and the number of missing uses."""
    config, tokens = layer.config, len(uses.x)
    rooms = {
        "x": guarded(uses.x),
        "topk_ids": guarded(uses.ids),
        "topk_weights": guarded(uses.weights),
        "slot_table": guarded(layer.slot_table),
        "out": guarded(np.empty((tokens, config.width), np.float32 if float_out else np.uint16)),
        "missing": guarded(np.empty(1, np.int32)),
        "workspace": guarded(np.empty(library.workspace_bytes(config, tokens), np.uint8)),
    }
    for name in ("out", "missing", "workspace"):
        rooms[name][0][:] = POISON
    at = {name: view.ctypes.data for name, (_, view) in rooms.items()}
    library.enqueue(
        config,
        MoeCall(
            tokens=tokens,
            num_slots=len(layer.arena),
            x=at["x"],
            topk_ids=at["topk_ids"],
            topk_weights=at["topk_weights"],
            slot_table=at["slot_table"],
            slot_arena=layer.arena.ctypes.data,
            out=at["out"],
            missing=at["missing"],
            workspace=at["workspace"],
            carry=0 if carry is None else carry.ctypes.data,
            float_out=float_out,
        ),
    )
    for name, (room, _) in rooms.items():
        assert (room[:256] == POISON).all(), f"wrote before {name}"
        assert (room[-256:] == POISON).all(), f"wrote after the end of {name}"
    return rooms["out"][1], int(rooms["missing"][1][0])


def reference(layer: Layer, uses: Uses) -> npt.NDArray[np.float64]:
    """The same layer in float64, with h rounded to the activations' type as in the kernels."""
    config = layer.config
    x = loaded(uses.x, config.activation_dtype)
    out = np.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(uses.ids[token], uses.weights[token], strict=True):
            if not 0 <= expert < config.num_experts or layer.slot_table[expert] < 0:
                continue
            gate_up, down = (matrix.astype(np.float64) for matrix in layer.matrices[expert])
            gate, up = np.split(gate_up @ x[token], 2)
            h = stored(
                (gate / (1 + np.exp(-gate)) * up).astype(np.float32), config.activation_dtype
            )
            out[token] += weight * (down @ loaded(h, config.activation_dtype))
    return out


def relative_error(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# An h that float32 and float64 round to different neighbours moves one element of h by a rounding
# step; a wrong index, scale or fragment moves the norm by a tenth or more.
TOLERANCE = {"float16": 1e-4, "bfloat16": 8e-4}


@every_kind
@pytest.mark.parametrize("tokens", [1, DECODE, 8, PLANNED, 33, WIDE])
def test_every_path_gives_the_reference(
    library: MoeLibrary, config: MoeConfig, tokens: int
) -> None:
    layer, uses = random_layer(config), random_uses(config, tokens)
    out, missing = run(library, layer, uses)
    assert relative_error(out, reference(layer, uses)) < TOLERANCE[config.activation_dtype]
    assert missing == 0


@every_kind
def test_the_output_in_the_activations_type_is_the_float_one_rounded(
    library: MoeLibrary, config: MoeConfig
) -> None:
    layer = random_layer(config)
    for tokens in (DECODE, PLANNED):
        uses = random_uses(config, tokens)
        exact, _ = run(library, layer, uses)
        rounded, _ = run(library, layer, uses, float_out=False)
        np.testing.assert_array_equal(rounded, stored(exact, config.activation_dtype))


@one_of_each
@pytest.mark.parametrize("tokens", [8, PLANNED, WIDE])
def test_all_tokens_may_choose_one_expert(
    library: MoeLibrary, config: MoeConfig, tokens: int
) -> None:
    layer, uses = random_layer(config), random_uses(config, tokens)
    uses.ids[:] = [5, 2, 6]
    out, _ = run(library, layer, uses)
    assert relative_error(out, reference(layer, uses)) < TOLERANCE[config.activation_dtype]


@one_of_each
@pytest.mark.parametrize("tokens", [DECODE, 8, PLANNED])
def test_a_token_may_name_an_expert_twice(
    library: MoeLibrary, config: MoeConfig, tokens: int
) -> None:
    layer, uses = random_layer(config), random_uses(config, tokens)
    uses.ids[:] = 4
    out, _ = run(library, layer, uses)
    assert relative_error(out, reference(layer, uses)) < TOLERANCE[config.activation_dtype]


@one_of_each
@pytest.mark.parametrize("tokens", [1, DECODE, PLANNED, WIDE])
def test_missing_experts_are_counted_and_add_nothing(
    library: MoeLibrary, config: MoeConfig, tokens: int
) -> None:
    uses = random_uses(config, tokens)
    layer = random_layer(config).with_only([0, 2, 3, 7])
    out, missing = run(library, layer, uses)
    assert missing == int((layer.slot_table[uses.ids] < 0).sum()) > 0
    assert relative_error(out, reference(layer, uses)) < TOLERANCE[config.activation_dtype]


@one_of_each
@pytest.mark.parametrize("tokens", [DECODE, PLANNED])
def test_with_no_expert_resident_the_output_is_zero(
    library: MoeLibrary, config: MoeConfig, tokens: int
) -> None:
    out, missing = run(library, random_layer(config).with_only([]), random_uses(config, tokens))
    assert not out.any()
    assert missing == tokens * config.top_k


@one_of_each
@pytest.mark.parametrize("tokens", [DECODE, PLANNED])
def test_an_id_or_slot_out_of_range_is_missing_and_never_read(
    library: MoeLibrary, config: MoeConfig, tokens: int
) -> None:
    layer, uses = random_layer(config), random_uses(config, tokens)
    uses.ids[:, 0] = np.resize([config.num_experts, -1, 1 << 30], tokens)
    uses.ids[:, 1] = 5
    uses.ids[:, 2] = 6
    layer.slot_table[5] = len(layer.arena)
    _, missing = run(library, layer, uses)
    assert missing == 2 * tokens


@one_of_each
@pytest.mark.parametrize("tokens", [DECODE, PLANNED, WIDE])
def test_slots_and_the_order_of_the_top_k_change_no_bit(
    library: MoeLibrary, config: MoeConfig, tokens: int
) -> None:
    layer, uses = random_layer(config), random_uses(config, tokens)
    expected, _ = run(library, layer, uses)
    turned = Uses(uses.x, np.roll(uses.ids, 1, 1), np.roll(uses.weights, 1, 1))
    for found, _ in (
        run(library, layer.in_other_slots(3), uses),
        run(library, layer, turned),
    ):
        np.testing.assert_array_equal(found, expected)


@one_of_each
@pytest.mark.parametrize("tokens", [DECODE, PLANNED, WIDE])
def test_waves_of_experts_change_no_bit(
    library: MoeLibrary, config: MoeConfig, tokens: int
) -> None:
    layer, uses = random_layer(config), random_uses(config, tokens)
    expected, _ = run(library, layer, uses)
    carry: Array | None = None
    missing = 0
    for wave in ([0, 1, 2], [3], [4, 5, 6, 7]):
        carry, missing_now = run(library, layer.with_only(wave), uses, carry=carry)
        missing += missing_now
    assert carry is not None
    np.testing.assert_array_equal(carry, expected)
    assert missing == 2 * tokens * config.top_k  # each use was missing from two of three waves


@one_of_each
@pytest.mark.parametrize("tokens", [8, PLANNED])
def test_a_tokens_bits_do_not_depend_on_its_neighbours(
    library: MoeLibrary, config: MoeConfig, tokens: int
) -> None:
    layer, uses = random_layer(config), random_uses(config, tokens)
    expected, _ = run(library, layer, uses)
    others = random_uses(config, tokens, seed=9)
    for array, other in (
        (uses.x, others.x),
        (uses.ids, others.ids),
        (uses.weights, others.weights),
    ):
        array[1:] = other[1:]
    uses.x[2] = 0x7FFF  # NaN
    found, _ = run(library, layer, uses)
    np.testing.assert_array_equal(found[0], expected[0])
    assert np.isnan(found[2]).all()
    assert np.isfinite(found[3:]).all()


def test_a_long_prefill_runs_in_passes(library: MoeLibrary) -> None:
    config = config_of(("float16", None, "float16", 16, 16), num_experts=3, top_k=2)
    layer, uses = random_layer(config).with_only([0, 2]), random_uses(config, 515)
    out, missing = run(library, layer, uses)
    assert relative_error(out, reference(layer, uses)) < TOLERANCE["float16"]
    assert missing == int((uses.ids == 1).sum())
    assert library.workspace_bytes(config, 1 << 20) == library.workspace_bytes(config, 512)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (16, 16), (70, 6)])
@pytest.mark.parametrize("tokens", [1, 8, PLANNED])
def test_any_number_of_experts_may_be_chosen(
    library: MoeLibrary, num_experts: int, top_k: int, tokens: int
) -> None:
    config = config_of(("int8", None, "float16", 48, 32), num_experts, top_k)
    layer, uses = random_layer(config), random_uses(config, tokens)
    out, _ = run(library, layer, uses)
    assert relative_error(out, reference(layer, uses)) < TOLERANCE["float16"]


@given(
    kind=st.sampled_from([(kind[0], kind[1], kind[2]) for kind in KINDS]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
@settings(deadline=None, max_examples=50)
def test_python_and_cpp_agree_on_the_place_of_every_byte_of_a_record(
    library: MoeLibrary,
    kind: tuple[ExpertDtype, int | None, ActivationDtype],
    sizes: tuple[int, int],
) -> None:
    step = kind[1] or 16
    config = config_of((*kind, sizes[0] * step, sizes[1] * step))
    record_format: RecordFormat = config.record_format
    layout = library.record_layout(config)
    assert layout.record_bytes == record_format.record_bytes
    for name, section in record_format.sections.items():
        assert getattr(layout, name) == section.offset


GOOD = config_of(KINDS[6])


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (replace(GOOD, weight_dtype="float32", group=None), "weights: expected"),
        (replace(GOOD, group=16), "weights: expected"),
        (replace(GOOD, weight_dtype="int8"), "weights: expected"),
        (replace(GOOD, weight_dtype="bfloat16", group=None), "same type"),
        (
            replace(GOOD, weight_dtype="float16", group=None, activation_dtype="bfloat16"),
            "same type",
        ),
        (replace(GOOD, activation_dtype="float32"), "activations: expected"),  # type: ignore[arg-type]
        (replace(GOOD, width=200), "width: expected"),
        (replace(GOOD, width=1 << 30), "width: expected"),
        (replace(GOOD, ffn_width=0), "ffn_width: expected"),
        (replace(GOOD, ffn_width=1 << 30), "ffn_width: expected"),
        (replace(GOOD, num_experts=513), "num_experts: expected"),
        (replace(GOOD, top_k=17), "top_k: expected"),
        (replace(GOOD, top_k=0), "top_k: expected"),
    ],
)
def test_a_layer_that_the_kernels_do_not_support_is_refused_by_name(
    library: MoeLibrary, config: MoeConfig, found: str
) -> None:
    assert library.refusal(GOOD) is None
    assert found in (library.refusal(config) or "accepted")


def test_a_layer_at_every_limit_is_supported(library: MoeLibrary) -> None:
    for at_limit in ({"width": 1 << 16, "ffn_width": 1 << 16}, {"num_experts": 512, "top_k": 16}):
        assert library.refusal(replace(GOOD, **at_limit)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [0, -1])
def test_a_call_without_tokens_is_refused(library: MoeLibrary, tokens: int) -> None:
    with pytest.raises(RuntimeError, match="cudaError 1"):
        library.enqueue(
            GOOD,
            MoeCall(
                tokens=tokens,
                num_slots=1,
                x=0,
                topk_ids=0,
                topk_weights=0,
                slot_table=0,
                slot_arena=0,
                out=0,
                missing=0,
                workspace=0,
            ),
        )
