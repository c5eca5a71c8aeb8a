"""Build one DtMoE node into a TensorRT-RTX engine, in a child process because the builder may
crash.

It reads one JSON object from its arguments and prints one JSON line: the plan's size and errors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnx
import tensorrt_rtx as trt  # type: ignore[import-not-found, unused-ignore]
from onnx import TensorProto, helper

_TYPES = {
    name: getattr(TensorProto, name.upper())
    for name in ("float16", "bfloat16", "float", "uint8", "int8", "int32", "int64")
}


class _Log(trt.ILogger):  # type: ignore[misc, unused-ignore]
    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, text: str) -> None:
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(text)


def moe_model(case: dict[str, Any]) -> bytes:
    """The graph x + DtMoE(x, ...) with every tensor as an input and the exporter's node."""
    width, experts, top_k = case["width"], case["num_experts"], case["top_k"]
    inputs = {
        "x": (case["activation"], ["T", width]),
        "topk_ids": (case.get("ids", "int32"), ["T", top_k]),
        "topk_weights": (case.get("weights", "float"), ["T", top_k]),
        "slot_table": ("int32", [experts]),
        "slot_arena": (case["arena"], [case["num_slots"], case["arena_columns"]]),
    }
    if case["carry"]:
        inputs["carry"] = ("float", ["T", width])
    attributes = ("weight_dtype", "group", "width", "ffn_width", "num_experts", "top_k", "carry")
    node = helper.make_node(
        "DtMoE",
        list(inputs),
        ["y", "missing"],
        domain="deeptalk",
        plugin_version="1",
        plugin_namespace="deeptalk",
        **{name: case[name] for name in attributes},
    )
    out_type = "float" if case["carry"] else case["activation"]
    graph = helper.make_graph(
        [node],
        "moe",
        [
            helper.make_tensor_value_info(name, _TYPES[kind], shape)
            for name, (kind, shape) in inputs.items()
        ],
        [
            helper.make_tensor_value_info("y", _TYPES[out_type], ["T", width]),
            helper.make_tensor_value_info("missing", TensorProto.INT32, [1]),
        ],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("deeptalk", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    return bytes(model.SerializeToString())


def build(case: dict[str, Any]) -> dict[str, Any]:
    log = _Log()
    builder = trt.Builder(log)
    registry = trt.get_plugin_registry()
    registry.load_library(case["plugin"])
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(moe_model(case)):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        return {"bytes": 0, "errors": errors + log.errors}
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(case["targets"])
    for i, target in enumerate(case["targets"]):
        config.set_compute_capability(trt.ComputeCapability.__members__[target], i)
    for tokens in ((1, 1, 1), (1, 64, 256)):
        profile = builder.create_optimization_profile()
        shapes = {"x": case["width"], "topk_ids": case["top_k"], "topk_weights": case["top_k"]}
        if case["carry"]:
            shapes["carry"] = case["width"]
        for name, columns in shapes.items():
            profile.set_shape(name, *((t, columns) for t in tokens))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"bytes": 0, "errors": log.errors}
    if "plan" in case:
        Path(case["plan"]).write_bytes(plan)
    return {"bytes": plan.nbytes, "errors": log.errors}


if __name__ == "__main__":
    print(json.dumps(build(json.loads(sys.argv[1]))))
