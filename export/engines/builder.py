"""The builder: one ONNX graph to one TensorRT engine, or a list of nodes that TensorRT cannot take.

A separate program, because TensorRT's builder may end by a signal. It is given one JSON object and
prints one, in its last line; what TensorRT says goes to stderr as it comes. The same lines serve
TensorRT-RTX, which compiles for cards that it need not see, and full TensorRT, which builds for the
device that it runs on: their modules differ in what is looked up by name here.

Nothing but the standard library and TensorRT is imported, so a device needs no more.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

JETPACKS = {"10.3.": "JetPack 6", "10.13.": "JetPack 7.0 or 7.1", "10.16.": "JetPack 7.2"}


def main() -> None:
    job = json.loads(sys.argv[1])
    trt = importlib.import_module(job["backend"])
    log = make_log(trt)
    print(json.dumps({"version": trt.__version__, **run(trt, log, job)}))


def run(trt: Any, log: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Build or check; a refusal is a result with a `problem`."""
    wanted = job["version"]
    if wanted and not f"{trt.__version__}.".startswith(f"{wanted}."):
        found = f"{trt.__name__} {trt.__version__}{jetpack_of(trt.__version__)}"
        return {
            "problem": f"this machine has {found}, the target wants {wanted}{jetpack_of(wanted)}; "
            "choose the device profile of this machine's software"
        }
    builder = trt.Builder(log)  # the plugin registry finds its logger through it
    for plugin in job["plugins"]:
        if trt.get_plugin_registry().load_library(plugin) is None:
            return {"problem": f"{plugin}: not a plugin library for this machine"}
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if job["what"] == "check":
        return {"unsupported": unsupported_nodes(parser, job["graph"])}
    if not parser.parse_from_file(job["graph"]):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        return {
            "problem": "; ".join(
                f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors
            )
        }
    return build(trt, builder, network, job)


def jetpack_of(version: str) -> str:
    """The JetPack that brings a version of TensorRT, in brackets."""
    releases = (release for series, release in JETPACKS.items() if f"{version}.".startswith(series))
    return "".join(f" ({release})" for release in releases)


def network_flags(trt: Any) -> int:
    """Types as the graph says them: a flag up to TensorRT 10, the only way from 11 on."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def unsupported_nodes(parser: Any, graph: str) -> list[dict[str, str]]:
    """The nodes that keep a graph from being taken, with the parser's reasons."""
    if parser.supports_model_v2(Path(graph).read_bytes(), graph):
        return []
    errors = (parser.get_error(i) for i in range(parser.num_errors))
    return [
        {"operator": e.node_operator(), "node": e.node_name(), "reason": e.desc()} for e in errors
    ]


def build(trt: Any, builder: Any, network: Any, job: dict[str, Any]) -> dict[str, Any]:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; what is float32 decides: the router
    config.max_aux_streams = 0  # signals between streams are a third of a MoE layer's operations
    # TensorRT-RTX: contexts then run in scratch memory of ours, which a CUDA graph needs.
    if "REQUIRE_USER_ALLOCATION" in trt.BuilderFlag.__members__:
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if job["targets"]:
        config.num_compute_capabilities = len(job["targets"])
        for i, target in enumerate(job["targets"]):
            name = target.replace("_", "").upper()
            config.set_compute_capability(trt.ComputeCapability.__members__[name], i)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, tuple(least), tuple(usual), tuple(most))
        config.add_optimization_profile(profile)
    began = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"problem": "the builder gave no engine"}
    with open(job["engine"], "wb") as file:
        file.write(plan)
    return {
        "bytes": plan.nbytes,
        "seconds": round(time.monotonic() - began, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def make_log(trt: Any) -> Any:
    """Warnings and errors to stderr as they come: what was said last is read after a crash."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                print(f"{severity.name}: {text}", file=sys.stderr, flush=True)

    return Log()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose inspect.py is not the standard library's
    main()
