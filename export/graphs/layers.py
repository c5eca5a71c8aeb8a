"""Layers that the encoder and the decoder share."""

from __future__ import annotations

from typing import Literal

import ml_dtypes
import numpy as np

from deeptalk_edge.calibration.quantise import quantise_int4, quantise_int8
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.export.graphs.builder import FLOAT, Array, Graph, Nodes
from deeptalk_edge.model.spec import DecoderSpec

Dense = Literal["float", "given", "int8", "int4"]
"""How dense weights are held: as constants; as inputs, which several engines share; as constants
with one scale per output, or per 64 inputs of one."""

_INT4_BLOCK = 64


def linear(graph: Graph, value: str, name: str, weight: Array, dense: Dense = "float") -> str:
    """A bias-free linear layer; `weight` is (outputs, inputs) as in torch.

    Raises ArtifactError if int4's groups do not fit it.
    """
    if dense == "float":
        return graph.op("MatMul", value, graph.weight(f"{name}.weight", weight.T))
    if dense == "given":
        # Gemm's own transposition is free; an engine copies a weight before any other form.
        rows = graph.reshape(value, -1, weight.shape[1])
        product = graph.op("Gemm", rows, graph.given(f"{name}.weight", weight), transB=1)
        shape = graph.op("Concat", graph.op("Shape", value, end=-1), graph.ints(-1), axis=0)
        return graph.op("Reshape", product, shape)
    if dense == "int8":
        integers, row_scales = quantise_int8(weight)
        stored = graph.array(f"{name}.weight", integers.T)
        scale = graph.weight(f"{name}.scales", row_scales[:, 0])
        restored = graph.op("DequantizeLinear", stored, scale, axis=1)
    else:
        if weight.shape[1] % _INT4_BLOCK:
            raise ArtifactError(
                f"{name}: rows of {weight.shape[1]} weights, int4 takes multiples of "
                f"{_INT4_BLOCK}; hold the dense weights in int8"
            )
        integers, scales = quantise_int4(weight, _INT4_BLOCK)
        stored = graph.array(f"{name}.weight", integers.T.astype(ml_dtypes.int4))
        scale = graph.weight(f"{name}.scales", scales.T)
        restored = graph.op("DequantizeLinear", stored, scale, axis=0, block_size=_INT4_BLOCK)
    return graph.op("MatMul", value, restored)


def int8_gemv(graph: Graph, value: str, name: str, weight: Array) -> str:
    """The same in int8 for the few rows of a decoding step, (B, T, inputs) to (B, T, outputs).

    TensorRT-RTX 1.7.1 fuses this into one kernel that reads int8; before a MatMul it writes the
    whole weight out in float16 first.
    """
    integers, scales = quantise_int8(weight)
    stored = graph.array(f"{name}.weight", integers)
    scale = graph.weight(f"{name}.scales", scales[:, 0])
    restored = graph.exact(graph.op("DequantizeLinear", stored, scale, axis=0))
    rows = graph.exact(graph.op("Unsqueeze", value, graph.ints(2)))
    product = graph.op("Mul", rows, restored)
    return graph.half(graph.op("ReduceSum", product, graph.ints(-1), keepdims=0))


def integer_linear(graph: Graph, value: str, name: str, weight: Array) -> str:
    """A linear layer in integers for ONNX Runtime on a CPU; rows are rounded as they come.

    On a CPU with AVX2 but no VNNI `session.x64quantprecision` has to be 1, else sums saturate.
    """
    integers, scales = quantise_int8(weight)
    stored = graph.array(f"{name}.weight", integers.T)
    rows, scale, zero = graph.ops("DynamicQuantizeLinear", value, num_outputs=3)
    sums = graph.op("Cast", graph.op("MatMulInteger", rows, stored, zero), to=FLOAT)
    steps = graph.op("Mul", scale, graph.weight(f"{name}.scales", scales[:, 0]))
    return graph.op("Mul", sums, steps)


def rounded(weight: Array, dense: Dense) -> Array:
    """The values that a weight has once it is held so."""
    if dense in ("float", "given"):
        return weight
    integers, scales = (
        quantise_int8(weight) if dense == "int8" else quantise_int4(weight, _INT4_BLOCK)
    )
    steps = np.repeat(scales.astype(np.float32), weight.shape[1] // scales.shape[1], axis=1)
    return integers * steps


def choose_experts(graph: Nodes, logits: str, spec: DecoderSpec) -> tuple[str, str]:
    """A router's logits (.., E) to the weights of the experts of each token, and their int64 ids,
    both (.., k)."""
    shares = graph.op("Softmax", logits, axis=-1)
    weights, ids = graph.ops("TopK", shares, graph.ints(spec.top_k), num_outputs=2, axis=-1)
    if spec.normalises_weights:
        total = graph.op("ReduceSum", weights, graph.ints(-1), keepdims=1)
        return graph.op("Div", weights, total), ids
    if spec.routed_scale != 1.0:
        weights = graph.op("Mul", weights, graph.scalar(spec.routed_scale))
    return weights, ids


def silu_times_up(graph: Graph, gate_up: str, ffn_width: int) -> str:
    """silu(gate) * up, for gate and up side by side in the last axis."""
    gate, up = graph.split(gate_up, [ffn_width, ffn_width])
    return graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
