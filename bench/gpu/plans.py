"""Small TensorRT-RTX plans for the GPU check's second step, built on a machine without a GPU.

    python -m deeptalk_edge.bench gpu_plans PLUGIN.so CHECKPOINT build/gpu_plans

Each plan comes with inputs and expected outputs, computed here by ONNX Runtime or numpy; engines.py
compares them. Plans without a target have TensorRT-RTX's portable form, "sm_80 and later", which is
the only form for a card outside its list, such as an H100.
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.calibration.quantise import quantise_expert
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.export.engines.build import EngineSettings, ShapeProfile, build_engine
from deeptalk_edge.export.graphs.moe_operators import rewrite_as_operators
from deeptalk_edge.export.graphs.step import StepSettings, export_step
from deeptalk_edge.export.verify.run_step import Arena

Array = NDArray[Any]

_CACHED_ROWS = 64


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 3:
        sys.exit(__doc__)
    plugin, checkpoint, place = map(Path, words)
    place.mkdir(parents=True, exist_ok=True)
    portable = EngineSettings(backend="tensorrt_rtx", plugins=(plugin.resolve(),))
    ada = EngineSettings(
        backend="tensorrt_rtx", plugins=(plugin.resolve(),), targets=("sm_86", "sm_89", "sm_120")
    )
    write_steps(Checkpoint.open(checkpoint), place, portable)
    for name, settings in (("moe_portable", portable), ("moe_rtx", ada)):
        write_moe(place, name, settings)
    for plan in place.glob("*.plan"):  # a plan compresses well
        with lzma.open(f"{plan}.xz", "wb") as file:
            file.write(plan.read_bytes())
        plan.unlink()
    total = sum(path.stat().st_size for path in place.iterdir())
    print(f"{place}: {len(list(place.glob('*.plan.xz')))} plans, {total / 1e6:.1f} MB")


def write_steps(checkpoint: Checkpoint, place: Path, settings: EngineSettings) -> None:
    """Write a decoding step of a whole checkpoint, with the plugin and with stock operators."""
    spec = checkpoint.spec.decoder
    records = RecordFormat(dtype="int8", width=spec.width, ffn_width=spec.expert_ffn_width)
    export_step(checkpoint, place, StepSettings(records=records, context_rows=_CACHED_ROWS))
    rewrite_as_operators(place / "step.onnx", place / "step_native.onnx")
    arenas = {layer: _arena(checkpoint, records, layer) for layer in spec.moe_layers}
    rng = np.random.default_rng(2)
    values: dict[str, Array] = {
        "x": rng.standard_normal((1, 1, spec.width)).astype(np.float32) / 8,
        "positions": np.array([_CACHED_ROWS // 2], np.int32),
    }
    for layer in range(spec.num_layers):
        for name, width in (("latent", spec.latent_dim), ("rope", spec.rope_dim)):
            cache = rng.standard_normal((1, _CACHED_ROWS, width)) / 8
            values[f"{name}_{layer}"] = cache.astype(np.float16)
    for layer, arena in arenas.items():
        values[f"slot_table_{layer}"] = arena.slot_table
        values[f"slot_arena_{layer}"] = arena.records.view(np.int32)
    import onnxruntime  # after deeptalk_edge, which turns its telemetry off

    session = onnxruntime.InferenceSession(place / "step_native.onnx")
    native: dict[str, Array] = {}
    for node in session.get_inputs():
        base, _, array = node.name.partition(".")
        layer = int(base.rpartition("_")[2]) if array else 0
        dtype = np.int8 if node.type == "tensor(int8)" else np.float32
        native[node.name] = arenas[layer].view(dtype) if array else values[base]
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, native), strict=True))
    # The ids are left out, because float16 may decide a tie of the router either way.
    expected = {name: outputs[name] for name in ("hidden", "new_latents", "new_ropes", "missing")}
    for name, inputs in (("step", values), ("step_native", native)):
        graph = place / f"{name}.onnx"
        profile = {key: [list(array.shape)] * 3 for key, array in inputs.items()}
        build_engine(graph, place / f"{name}_portable.plan", [profile], settings)
        graph.unlink()
    # With stock operators, engines.py binds every array of an arena to the one buffer.
    for name in ("step", "step_native"):
        save_case(place / f"{name}_portable.npz", values, expected)
    (place / "step.bin").unlink()


def _arena(checkpoint: Checkpoint, records: RecordFormat, layer: int) -> Arena:
    """Make an arena with every expert of a layer in the slot of its number."""
    packed = []
    for expert in range(checkpoint.spec.decoder.num_experts):
        name = f"model.layers.{layer}.mlp.experts.{expert}"
        gate, up, down = (
            checkpoint.tensor(f"{name}.{part}_proj.weight") for part in ("gate", "up", "down")
        )
        weights = quantise_expert(records, np.concatenate([gate, up]), down)
        packed.append(records.pack(weights))
    return Arena(np.stack(packed), np.arange(len(packed), dtype=np.int32))


def write_moe(place: Path, name: str, settings: EngineSettings) -> None:
    """Write one layer's routed experts with the plugin: int8 records, one expert without a slot."""
    width, ffn_width, num_experts, top_k, tokens = 256, 128, 8, 3, 5
    rng = np.random.default_rng(1)
    record_format = RecordFormat(dtype="int8", width=width, ffn_width=ffn_width)
    slot_table = np.array([2, 5, 0, -1, 6, 1, 4, 3], np.int32)
    arena = np.zeros((7, record_format.record_bytes), np.uint8)
    matrices = []
    for slot in slot_table:
        gate_up = rng.standard_normal((2 * ffn_width, width), np.float32) / 16
        down = rng.standard_normal((width, ffn_width), np.float32) / 16
        weights = quantise_expert(record_format, gate_up, down)
        matrices.append(record_format.dequantise(weights))
        if slot >= 0:
            arena[slot] = record_format.pack(weights)
    x = rng.standard_normal((tokens, width)).astype(np.float16)
    ids = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    shares = rng.random((tokens, top_k)).astype(np.float32)
    y = np.zeros((tokens, width), np.float64)
    missing = 0
    for token, expert, share in zip(
        np.repeat(np.arange(tokens), top_k), ids.ravel(), shares.ravel(), strict=True
    ):
        if slot_table[expert] < 0:
            missing += 1
            continue
        gate_up, down = matrices[expert]
        gate, up = np.split(gate_up @ x[token].astype(np.float64), 2)
        y[token] += share * (down @ (gate / (1 + np.exp(-gate)) * up))
    inputs: dict[str, Array] = {
        "x": x,
        "topk_ids": ids,
        "topk_weights": shares,
        "slot_table": slot_table,
        "slot_arena": arena.view(np.int32),
    }
    graph = place / "moe.onnx"
    onnx.save(_moe_model(inputs, width, ffn_width, num_experts, top_k), graph)
    profile: ShapeProfile = {
        key: ((1, columns), (4, columns), (16, columns))
        for key, columns in (("x", width), ("topk_ids", top_k), ("topk_weights", top_k))
    }
    build_engine(graph, place / f"{name}.plan", [profile], settings)
    graph.unlink()
    expected = {"y": y.astype(np.float32), "missing": np.array([missing], np.int32)}
    save_case(place / f"{name}.npz", inputs, expected)


def _moe_model(
    inputs: dict[str, Array], width: int, ffn_width: int, num_experts: int, top_k: int
) -> onnx.ModelProto:
    node = helper.make_node(
        "DtMoE",
        list(inputs),
        ["y", "missing"],
        domain="deeptalk",
        plugin_version="1",
        plugin_namespace="deeptalk",
        weight_dtype="int8",
        group=0,
        width=width,
        ffn_width=ffn_width,
        num_experts=num_experts,
        top_k=top_k,
        carry=0,
    )
    values = [
        helper.make_tensor_value_info(
            name,
            helper.np_dtype_to_tensor_dtype(array.dtype),
            array.shape if name.startswith("slot_") else ("T", array.shape[1]),
        )
        for name, array in inputs.items()
    ]
    results = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT16, ("T", width)),
        helper.make_tensor_value_info("missing", TensorProto.INT32, (1,)),
    ]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("deeptalk", 1)]
    graph = helper.make_graph([node], "moe", values, results)
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def save_case(path: Path, inputs: dict[str, Array], expected: dict[str, Array]) -> None:
    """Save inputs by their names and expected outputs with the prefix `expected_`."""
    arrays: dict[str, Any] = {**inputs, **{f"expected_{k}": v for k, v in expected.items()}}
    np.savez(path, **arrays)
