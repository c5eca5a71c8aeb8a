"""Layers that the encoder and the decoder share."""

from __future__ import annotations

from deeptalk_edge.export.graph import Array, Graph


def linear(graph: Graph, value: str, name: str, weight: Array) -> str:
    """A bias-free linear layer; `weight` is (outputs, inputs) as in torch."""
    return graph.op("MatMul", value, graph.weight(f"{name}.weight", weight.T))


def swiglu(graph: Graph, value: str, name: str, gate_up: Array, down: Array) -> str:
    """down(silu(gate x) * up x), for `gate_up` (2G, C), gate first, and `down` (C, G)."""
    both = linear(graph, value, f"{name}.gate_up", gate_up)
    return linear(graph, silu_times_up(graph, both, len(gate_up) // 2), f"{name}.down", down)


def silu_times_up(graph: Graph, gate_up: str, ffn_width: int) -> str:
    """silu(gate) * up, for gate and up side by side in the last axis."""
    gate, up = graph.split(gate_up, [ffn_width, ffn_width])
    return graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
