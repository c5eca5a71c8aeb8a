"""Cuts a step after each layer that routes: every piece is a step by itself, over the same files.

Only a piece's weights are in memory while it runs, so what a check needs does not follow the number
of layers. A piece takes `x` where the step has the layer before it and gives `hidden` where the
step has the next; of the stacked outputs it has its own layers' part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
from onnx import helper


def step_pieces(path: Path) -> Iterator[onnx.ModelProto]:
    """The pieces in their order, without their weights; export/graphs/step.py wrote the step."""
    model = onnx.load(str(path), load_external_data=False)
    routing = [
        int(value.name.removeprefix("slot_table_"))
        for value in model.graph.input
        if value.name.startswith("slot_table_")
    ]
    begin = 0
    for i, layer in enumerate(routing):
        yield _piece(model, range(begin, layer + 1), i, is_last=layer == routing[-1])
        begin = layer + 1


def _piece(
    model: onnx.ModelProto, layers: Sequence[int], moe: int, *, is_last: bool
) -> onnx.ModelProto:
    """The nodes that these layers' outputs hang on, back to the layer before."""
    graph = model.graph
    before, after = f"layer_{layers[0] - 1}", "hidden" if is_last else f"layer_{layers[-1]}"
    # How many rows are cached is asked of the first cache; all are as long.
    renamed = {before: "x", after: "hidden", "latent_0": f"latent_{layers[0]}"}
    parts = {"new_latents": layers, "new_ropes": layers, "expert_ids": [moe], "missing": [moe]}
    wanted = {after, *parts}
    nodes = []
    for whole in reversed(graph.node):
        if before in whole.output or not wanted.intersection(whole.output):
            continue
        node = onnx.NodeProto()
        node.CopyFrom(whole)
        if part := parts.get(node.output[0]):
            node.input[:] = [node.input[i] for i in part]
        wanted.update(node.input)
        for names in (node.input, node.output):
            names[:] = [renamed.get(name, name) for name in names]
        nodes.append(node)
    inputs = {renamed.get(name, name) for name in wanted}
    cut = helper.make_graph(
        nodes[::-1],
        graph.name,
        [value for value in graph.input if value.name in inputs],
        graph.output,
        [tensor for tensor in graph.initializer if tensor.name in wanted],
    )
    for value in cut.output:
        if part := parts.get(value.name):
            value.type.tensor_type.shape.dim[0].dim_value = len(part)
    return helper.make_model(cut, opset_imports=model.opset_import, ir_version=model.ir_version)
