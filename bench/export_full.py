"""Builds the decoding step of the official size as a TensorRT-RTX engine.

Weights are random, have the official shapes and are made on demand, so only the graph and the
engine need disk space. It shows for which cards the engine builds, the time and memory of the
build, and that a step copies no expert, weight or cache. It does not show speed, because nothing
runs. The last line of the output is JSON.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from deeptalk_edge.bench.harness import OFFICIAL_SIZE, arguments, measured
from deeptalk_edge.bench.random_checkpoint import RandomCheckpoint
from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.checkpoint.config import read_model_spec
from deeptalk_edge.export.engines.build import EngineSettings, build_engine
from deeptalk_edge.export.engines.inspect import EngineGraph, read_plan
from deeptalk_edge.export.engines.shapes import step_shape_ranges
from deeptalk_edge.export.graphs.moe_operators import rewrite_as_operators
from deeptalk_edge.export.graphs.step import StepSettings, export_step
from deeptalk_edge.model.spec import ModelSpec

CONTEXT_ROWS = 4096


def main(argv: list[str] | None = None) -> int:
    """Build, print the engine's contents, and print a line of JSON."""
    parser = arguments("export_full", __doc__)
    parser.add_argument("--like", type=Path, default=OFFICIAL_SIZE, help="config files")
    parser.add_argument("--work", type=Path, default="build/export_full", help="scratch: 10 GB")
    parser.add_argument("--plugin", type=Path, help="libdt_moe_plugin.so; without it no plugin")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--experts", choices=["int8", "int4"], default="int4")
    parser.add_argument("--targets", nargs="+", default=["sm_89", "sm_120"])
    args = parser.parse_args(argv)
    with measured(args) as figures:
        spec = read_model_spec(args.like)
        if args.layers:
            spec = replace(spec, decoder=replace(spec.decoder, num_layers=args.layers))
        args.work.mkdir(parents=True)
        try:
            built = build_step(spec, args.experts, tuple(args.targets), args.plugin, args.work)
        finally:
            shutil.rmtree(args.work)
        figures.update(built)
    return 0


def build_step(
    spec: ModelSpec, experts: Any, targets: tuple[str, ...], plugin: Path | None, work: Path
) -> dict[str, Any]:
    """Write the step of a model with random weights, build it and inspect the engine."""
    decoder = spec.decoder
    records = RecordFormat(
        dtype=experts,
        group=128 if experts == "int4" else None,
        width=decoder.width,
        ffn_width=decoder.expert_ffn_width,
    )
    settings = StepSettings(
        records=records,
        dense="given" if plugin else "float",
        num_rows=None if plugin else 1,
        context_rows=CONTEXT_ROWS,
    )
    began = time.monotonic()
    export_step(RandomCheckpoint(spec, work / "snac"), work, settings)
    graph = work / "step.onnx"
    if plugin is None:
        graph = work / "step_native.onnx"
        rewrite_as_operators(work / "step.onnx", graph)
    wrote_s = time.monotonic() - began
    profiles = step_shape_ranges(
        graph,
        moe="plugin" if plugin else "operators",
        context_rows=CONTEXT_ROWS,
        num_experts=decoder.num_experts,
        all_experts=decoder.num_experts * len(decoder.moe_layers),
    )
    built = build_engine(
        graph,
        work / "step.engine",
        profiles,
        EngineSettings(
            backend="tensorrt_rtx", targets=targets, plugins=(plugin,) if plugin else ()
        ),
    )
    expert = decoder.width * decoder.expert_ffn_width
    return {
        "layers": decoder.num_layers,
        "experts": experts,
        "moe": "plugin" if plugin else "operators",
        "targets": targets,
        "tensorrt_rtx": built.version,
        "engine_mb": round(built.bytes / 1e6, 1),
        "graph_s": round(wrote_s, 1),
        "build_s": built.seconds,
        "builder_peak_mb": round(built.peak_bytes / 1e6),
        "profiles": [
            plan_figures(plan, expert=expert, cache=CONTEXT_ROWS // 4 * decoder.latent_dim)
            for plan in read_plan(work / "step.engine")
        ],
    }


def plan_figures(plan: EngineGraph, *, expert: int, cache: int) -> dict[str, Any]:
    """Return an engine's figures for one profile; sizes in elements."""
    return {
        "operations": len(plan.operations),
        "plugins": len(plan.plugins),
        "scratch_mb": round(plan.scratch_bytes / 1e6, 1),
        "expert_sized_temporaries": [tensor.name for tensor in plan.temporaries_of(expert)],
        "copies": [operation.name for operation in plan.moves_of(min(expert, cache))],
    }


if __name__ == "__main__":
    raise SystemExit(main())
