"""The no-plugin form: every `DtMoE` node of a graph becomes plain operators of equal value.

    slots  = slot_table[ids]
    hidden = silu(gate . x) * (up . x)       gate, up and down by Gather -> Cast -> Mul -> ReduceSum
    routed = sum of weight * (down . hidden) over the experts that have a slot

A compiler fuses gather, dequantisation and product into one kernel that reads the chosen experts
where they lie; Gather -> MatMul would copy them first. Every token reads its own experts, so the
form fits a decoding step, not a prefill.

The records are those of bundle/expert_record.py, byte for byte. ONNX cannot reinterpret bytes, so
the int32 arena of a layer becomes one input for each array of a record, in that array's
type and (S, pages, page): `slot_arena_L.gate_up`, `.down`, `.gate_up_scales` and `.down_scales`,
all bound to the one buffer. Both reasons were measured on TensorRT-RTX 1.7.1: one input for two
arrays is gathered once for both, that is, copied; and for an int8 input the builder writes 8 bytes
into the plan for each element of the last axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from onnx import TensorProto, helper

from deeptalk_edge.bundle.expert_record import PAGE_BYTES, ExpertDtype, RecordFormat, Section
from deeptalk_edge.export.graphs.builder import FLOAT, INT32, Nodes, save
from deeptalk_edge.export.graphs.moe_node import KIND


def rewrite_as_operators(source: Path, target: Path) -> None:
    """Write `source` without `DtMoE` nodes as `target`, beside it: both read the same weights.

    Raises ValueError if `target` lies elsewhere.
    """
    if target.parent != source.parent:
        raise ValueError(f"{target}: expected a name in {source.parent}, where the weights lie")
    graph = onnx.load(str(source), load_external_data=False).graph
    nodes: list[onnx.NodeProto] = []
    views: dict[str, list[onnx.ValueInfoProto]] = {}
    for node in graph.node:
        if node.op_type != KIND:
            nodes.append(node)
            continue
        layer = _Layer(node)
        layer.write()
        nodes += layer.nodes
        graph.initializer.extend(layer.initialisers)
        views[layer.arena] = layer.views()
    inputs = [view for value in graph.input for view in views.get(value.name, [value])]
    for field, values in ((graph.node, nodes), (graph.input, inputs)):
        del field[:]
        field.extend(values)
    save(graph, target)


class _Layer(Nodes):
    """The replacement of one node; N tokens with k experts each."""

    def __init__(self, node: onnx.NodeProto) -> None:
        super().__init__(prefix=f"{node.name}.")
        self._x, self._ids, self._weights, self._slot_table, self.arena = node.input
        self._routed, self._missing = node.output
        attributes: dict[str, Any] = {
            attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute
        }
        self._top_k: int = attributes["top_k"]
        self._records = RecordFormat(
            dtype=cast(ExpertDtype, attributes["weight_dtype"].decode()),
            group=attributes["group"] or None,
            width=attributes["width"],
            ffn_width=attributes["ffn_width"],
        )
        self._slots = ""

    def views(self) -> list[onnx.ValueInfoProto]:
        """The inputs that replace the arena."""
        records = self._records
        return [
            helper.make_tensor_value_info(
                f"{self.arena}.{name}",
                self._element(section),
                (
                    f"{self.arena}.slots",
                    records.record_bytes // PAGE_BYTES,
                    PAGE_BYTES // section.dtype.itemsize,
                ),
            )
            for name, section in records.sections.items()
        ]

    def write(self) -> None:
        """Write all nodes."""
        width, ffn_width = self._records.width, self._records.ffn_width
        zero = self.constant(np.array(0, np.int32))
        ids = self.reshape(self._ids, -1, self._top_k)
        slots = self.op("Gather", self._slot_table, ids, axis=0)
        absent = self.op("Less", slots, zero)
        self._slots = self.op("Max", slots, zero)
        x = self.reshape(self.op("Cast", self._x, to=FLOAT), -1, 1, width)
        both = self._product("gate_up", x)
        gate, up = self.split(both, [ffn_width, ffn_width])
        hidden = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        weights = self.reshape(self._weights, -1, self._top_k, 1)
        y = self.op("Mul", self._product("down", hidden), weights)
        # Not a weight of 0: a slot that was never filled may hold NaN.
        y = self.op("Where", self.op("Unsqueeze", absent, self.ints(2)), self.scalar(0.0), y)
        total = self.op("CastLike", self.op("ReduceSum", y, self.ints(1), keepdims=0), self._x)
        count = self.op("ReduceSum", self.op("Cast", absent, to=INT32), keepdims=0)
        self._give(self._routed, "Reshape", total, self.op("Shape", self._x))
        self._give(self._missing, "Reshape", count, self.ints(1))

    def _product(self, name: str, x: str) -> str:
        """Each expert's matrix (rows, columns) on x (N, k or 1, columns): (N, k, rows)."""
        if self._records.group is not None:
            return self._grouped_product(name, x, self._records.group)
        rows, columns = self._records.sections[name].shape
        matrix = self._stored(name, rows, columns)
        product = self._sum(self.op("Mul", matrix, self.op("Unsqueeze", x, self.ints(2))))
        if f"{name}_scales" not in self._records.sections:
            return product
        return self.op("Mul", product, self._stored(f"{name}_scales", rows))

    def _grouped_product(self, name: str, x: str, group: int) -> str:
        """The same for int4: a byte is 16 * odd + even + 8, a scale serves `group` columns."""
        rows, groups = self._records.sections[f"{name}_scales"].shape
        byte = self._stored(name, rows, groups, group // 2)
        odd = self.op("Floor", self.op("Mul", byte, self.scalar(1 / 16)))
        even = self.op("Sub", byte, self.op("Mul", odd, self.scalar(16)))
        even = self.op("Sub", even, self.scalar(8))
        shape = self.op("Shape", x, start=0, end=2)
        shape = self.op("Concat", shape, self.ints(1, groups, group // 2, 2), axis=0)
        x_even, x_odd = self.split(self.op("Reshape", x, shape), [1, 1])
        product = self.op(
            "Add",
            self.op("Mul", even, self.op("Squeeze", x_even, self.ints(5))),
            self.op("Mul", odd, self.op("Squeeze", x_odd, self.ints(5))),
        )
        scales = self._stored(f"{name}_scales", rows, groups)
        scaled = self.op("Mul", product, self.op("Unsqueeze", scales, self.ints(-1)))
        return self.op("ReduceSum", scaled, self.ints(-2, -1), keepdims=0)

    def _stored(self, name: str, *shape: int) -> str:
        """One array of the chosen experts' records, (N, k, *shape), in float32."""
        section = self._records.sections[name]
        begin, end = (at // section.dtype.itemsize for at in (section.offset, section.end))
        records = self.op("Gather", f"{self.arena}.{name}", self._slots, axis=0)
        records = self.reshape(records, 0, 0, -1)
        found = self.op("Slice", records, self.ints(begin), self.ints(end), self.ints(2))
        return self.op("Cast", self.reshape(found, -1, self._top_k, *shape), to=FLOAT)

    def _element(self, section: Section) -> int:
        """ONNX's type of an array; bfloat16 is held in uint16."""
        if self._records.dtype == "bfloat16":
            return TensorProto.BFLOAT16
        return helper.np_dtype_to_tensor_dtype(section.dtype)

    def _sum(self, value: str) -> str:
        return self.op("ReduceSum", value, self.ints(-1), keepdims=0)

    def _give(self, output: str, kind: str, *inputs: str) -> None:
        """Add a node whose output bears the name that the old node's had."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}.native"))
