"""A DtMoE node and the plain operators that replace it, against the experts' definition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.calibration.quantise import quantise_expert
from deeptalk_edge.export.graphs.builder import FLOAT, FLOAT16, INT32, Graph, Precision
from deeptalk_edge.export.graphs.moe_node import moe_node
from deeptalk_edge.export.graphs.moe_operators import rewrite_as_operators
from deeptalk_edge.export.verify.run_step import Arena
from deeptalk_edge.training.experts import MixtureOfExperts, SwiGlu
from tests.export.arenas import filled_arena
from tests.specs import DECODER, RECORD_KINDS

Array = NDArray[Any]

NUM_EXPERTS, TOP_K, WIDTH, FFN_WIDTH = 7, 3, 256, 128
TOLERANCES = {"float32": 1e-5, "float16": 4e-3}  # of values of some units; half has 11 bits
FORMATS = {
    f"{dtype}-{group}" if group else dtype: RecordFormat(
        dtype=dtype, group=group, width=WIDTH, ffn_width=FFN_WIDTH
    )
    for dtype, group in RECORD_KINDS
}
every_format = pytest.mark.parametrize("records", FORMATS.values(), ids=FORMATS.keys())


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Experts, their inputs, and their outputs by definition."""

    records: RecordFormat
    experts: list[tuple[Array, Array]]
    x: Array
    ids: Array
    weights: Array

    @classmethod
    def random(cls, records: RecordFormat, num_tokens: int, seed: int = 0) -> Case:
        rng = np.random.default_rng(seed)
        experts = [
            (
                rng.standard_normal((2 * FFN_WIDTH, WIDTH), np.float32) / WIDTH**0.5,
                rng.standard_normal((WIDTH, FFN_WIDTH), np.float32) / FFN_WIDTH**0.5,
            )
            for _ in range(NUM_EXPERTS)
        ]
        choices = [rng.permutation(NUM_EXPERTS)[:TOP_K] for _ in range(num_tokens)]
        return cls(
            records=records,
            experts=experts,
            x=2 * rng.standard_normal((1, num_tokens, WIDTH), np.float32),
            ids=np.array(choices, np.int32)[None],
            weights=rng.random((1, num_tokens, TOP_K), np.float32),
        )

    def expected(self, resident: set[int]) -> Array:
        """float64, over the dequantised weights."""
        routed = np.zeros(self.x.shape)
        for (item, token, k), expert in np.ndenumerate(self.ids):
            if expert not in resident:
                continue
            weights = quantise_expert(self.records, *self.experts[expert])
            gate_up, down = (m.astype(np.float64) for m in self.records.dequantise(weights))
            gate, up = np.split(gate_up @ self.x[item, token], 2)
            y = down @ (gate / (1 + np.exp(-gate)) * up)
            routed[item, token] += self.weights[item, token, k] * y
        return routed

    def run(self, place: Path, arena: Arena, precision: Precision = "float32") -> dict[str, Array]:
        """Run the node's form without the plugin in ONNX Runtime, or in onnx's evaluator for
        bfloat16."""
        write_node(place, self.records, self.x.shape[1], precision)
        rewrite_as_operators(place / "moe.onnx", place / "native.onnx")
        feeds = {
            "x": self.x.astype(precision),
            "ids": self.ids,
            "weights": self.weights,
            "slot_table_1": arena.slot_table,
        }
        for name, section in self.records.sections.items():
            dtype = ml_dtypes.bfloat16 if self.records.dtype == "bfloat16" else section.dtype.type
            feeds[f"slot_arena_1.{name}"] = arena.view(dtype)
        if self.records.dtype == "bfloat16":
            outputs = ReferenceEvaluator(str(place / "native.onnx")).run(None, feeds)
        else:
            outputs = onnxruntime.InferenceSession(place / "native.onnx").run(None, feeds)
        return dict(zip(["y", "missing"], outputs, strict=True))


def write_node(
    place: Path, records: RecordFormat, num_tokens: int, precision: Precision = "float32"
) -> None:
    """moe.onnx: one node and nothing else."""
    spec = replace(
        DECODER, width=WIDTH, expert_ffn_width=FFN_WIDTH, num_experts=NUM_EXPERTS, top_k=TOP_K
    )
    kind = FLOAT if precision == "float32" else FLOAT16
    with Graph(place, "moe", precision=precision) as graph:
        x = graph.input("x", kind, (1, num_tokens, WIDTH))
        ids = graph.input("ids", INT32, (1, num_tokens, TOP_K))
        weights = graph.input("weights", FLOAT, (1, num_tokens, TOP_K))
        shape = (1, num_tokens, WIDTH)
        y, missing = moe_node(
            graph, x, ids, weights, layer=1, shape=shape, spec=spec, records=records
        )
        graph.output(y, "y", shape, data_type=kind)
        graph.output(missing, "missing", (1,), data_type=INT32)


@every_format
@pytest.mark.parametrize("num_tokens", [1, 2, 5])
def test_the_form_without_the_plugin_computes_the_experts_sum(
    records: RecordFormat, num_tokens: int, tmp_path: Path
) -> None:
    case = Case.random(records, num_tokens)
    found = case.run(tmp_path, filled_arena(case.experts, records, 0))
    expected = case.expected(set(range(NUM_EXPERTS)))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found["y"], expected, atol=TOLERANCES["float32"], rtol=0)
    assert found["missing"] == 0


@pytest.mark.parametrize("name", ["float16", "int8", "int4-64"])
def test_the_form_in_float16_computes_the_sum_within_rounding(name: str, tmp_path: Path) -> None:
    case = Case.random(FORMATS[name], 2)
    found = case.run(tmp_path, filled_arena(case.experts, case.records, 0), "float16")
    assert found["y"].dtype == np.float16
    expected = case.expected(set(range(NUM_EXPERTS)))
    np.testing.assert_allclose(found["y"], expected, atol=TOLERANCES["float16"], rtol=0)


@every_format
def test_slots_in_another_order_give_the_same_bits(records: RecordFormat, tmp_path: Path) -> None:
    case = Case.random(records, 2)
    found = [
        case.run(tmp_path, filled_arena(case.experts, records, seed))["y"] for seed in range(3)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@every_format
def test_an_expert_without_a_slot_adds_nothing_and_is_counted(
    records: RecordFormat, tmp_path: Path
) -> None:
    case = Case.random(records, 2)
    arena = filled_arena(case.experts, records, 0)
    gone = {int(case.ids[0, 0, 1]), int(case.ids[0, 1, 2])}
    for expert in gone:
        arena.records[arena.slot_table[expert]] = 0xFF
        arena.slot_table[expert] = -1
    arena.records[0] = 0xFF  # -1 is clamped to a poisoned slot
    if (in_0 := np.flatnonzero(arena.slot_table == 0)).size:
        gone.add(int(in_0[0]))
        arena.slot_table[in_0] = -1
    found = case.run(tmp_path, arena)
    expected = case.expected(set(range(NUM_EXPERTS)) - gone)
    np.testing.assert_allclose(found["y"], expected, atol=TOLERANCES["float32"], rtol=0)
    assert found["missing"] == np.isin(case.ids, list(gone)).sum() > 0


def test_the_node_matches_the_plugin(tmp_path: Path) -> None:
    """Names, order and types of native/tensorrt_plugin/README.md."""
    write_node(tmp_path, FORMATS["int4-64"], 2, "float16")
    model = onnx.load(str(tmp_path / "moe.onnx"))
    (node,) = model.graph.node
    assert (node.domain, node.op_type) == ("deeptalk", "DtMoE")
    assert list(node.input) == ["x", "ids", "weights", "slot_table_1", "slot_arena_1"]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes == {
        "plugin_version": b"1",
        "plugin_namespace": b"deeptalk",
        "weight_dtype": b"int4",
        "group": 64,
        "width": WIDTH,
        "ffn_width": FFN_WIDTH,
        "num_experts": NUM_EXPERTS,
        "top_k": TOP_K,
        "carry": 0,
    }
    arena = model.graph.input[-1].type.tensor_type
    assert arena.elem_type == TensorProto.INT32
    assert arena.shape.dim[1].dim_value == FORMATS["int4-64"].record_bytes // 4


def test_both_forms_read_the_same_weights(tmp_path: Path) -> None:
    write_node(tmp_path, FORMATS["int8"], 1)
    with pytest.raises(ValueError, match="where the weights lie"):
        rewrite_as_operators(tmp_path / "moe.onnx", tmp_path / "elsewhere" / "moe.onnx")


@pytest.mark.parametrize("kind", ["random", "an expert without tokens", "all tokens on the same"])
def test_training_evaluation_and_export_compute_the_same_sum(kind: str, tmp_path: Path) -> None:
    records, num_tokens = FORMATS["float32"], 9
    case = Case.random(records, num_tokens)
    if kind == "an expert without tokens":  # expert 4's tokens go to one that the token lacks
        free = [next(e for e in range(NUM_EXPERTS) if e not in (4, *t)) for t in case.ids[0]]
        ids = np.where(case.ids == 4, np.array(free, np.int32)[None, :, None], case.ids)
        assert 4 in case.ids and 4 not in ids  # noqa: PT018
        case = replace(case, ids=ids)
    elif kind == "all tokens on the same":
        case = replace(case, ids=np.broadcast_to(case.ids[:, :1], case.ids.shape).copy())
    mixture = _mixture_of(case)
    given = [torch.from_numpy(array[0]) for array in (case.x, case.weights, case.ids.astype("i8"))]
    trained = mixture.routed(*given)
    torch.autograd.backward(trained.sum())  # type: ignore[no-untyped-call, unused-ignore]
    with torch.inference_mode():
        evaluated = mixture.eval().routed(*given)
    exported = case.run(tmp_path, filled_arena(case.experts, records, 0))["y"]
    assert torch.equal(trained, evaluated)
    np.testing.assert_allclose(evaluated[None], exported, atol=TOLERANCES["float32"], rtol=0)
    used = {i for i, e in enumerate(mixture.experts) if _has_gradient(e)}
    assert used == set(case.ids.flatten().tolist())


def _mixture_of(case: Case) -> MixtureOfExperts:
    spec = replace(
        DECODER, width=WIDTH, expert_ffn_width=FFN_WIDTH, num_experts=NUM_EXPERTS, top_k=TOP_K
    )
    mixture = MixtureOfExperts(spec)
    for expert, (gate_up, down) in zip(mixture.experts, case.experts, strict=True):
        assert isinstance(expert, SwiGlu)
        gate, up = np.split(gate_up, 2)
        expert.gate_proj.weight.data = torch.from_numpy(gate)
        expert.up_proj.weight.data = torch.from_numpy(up)
        expert.down_proj.weight.data = torch.from_numpy(down)
    return mixture


def _has_gradient(expert: torch.nn.Module) -> bool:
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in expert.parameters())
