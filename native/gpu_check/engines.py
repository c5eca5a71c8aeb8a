"""Second step of the GPU check: do TensorRT-RTX plans with our plugin load and run on this card?

    python -m native.gpu_check.engines build/plugin/libdt_moe_plugin.so one_layer.plan ...

Needs tensorrt_rtx (`pip install tensorrt-rtx-cu13`) and a CUDA PyTorch. Plans may come from a
machine without a GPU. Every plan is tried; what TensorRT says is printed as one JSON line.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch


class Refused(Exception):
    """TensorRT-RTX would not load or run a plan."""


def run_plan(trt: Any, log: Any, plan: Path) -> dict[str, Any]:
    """Load a plan and run its first profile once, every input zero and every slot absent.

    Raises Refused.
    """
    engine = trt.Runtime(log).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise Refused("deserialize_cuda_engine gave nothing")
    context = engine.create_execution_context()
    if context is None:
        raise Refused("create_execution_context gave nothing")
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    tensors: dict[str, torch.Tensor] = {}
    for name in (*inputs, *(n for n in names if n not in inputs)):
        if name in inputs and -1 in tuple(engine.get_tensor_shape(name)):
            context.set_input_shape(name, engine.get_tensor_profile_shape(name, 0)[1])
        kind = getattr(torch, str(engine.get_tensor_dtype(name)).split(".")[-1].lower(), None)
        dtype = {"HALF": torch.float16, "BF16": torch.bfloat16, "FLOAT": torch.float32}.get(
            str(engine.get_tensor_dtype(name)).split(".")[-1], kind
        )
        if not isinstance(dtype, torch.dtype):
            raise Refused(f"{name}: torch has no {engine.get_tensor_dtype(name)}")
        fill = -1 if name == "slot_table" else 0
        shape = tuple(context.get_tensor_shape(name))
        tensors[name] = torch.full(shape, fill, dtype=dtype, device="cuda")
        context.set_tensor_address(name, tensors[name].data_ptr())
    if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
        raise Refused("execute_async_v3 failed")
    torch.cuda.synchronize()
    missing = tensors.get("missing")
    return {"ran": True, "missing": None if missing is None else int(missing)}


def main() -> int:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    if importlib.util.find_spec("tensorrt_rtx") is None:
        sys.exit("engines: tensorrt_rtx is not installed; no plan was tried")
    import tensorrt_rtx as trt  # type: ignore[import-not-found, unused-ignore]

    class Log(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(text)

    log = Log()
    builder = trt.Builder(log)  # the registry finds its logger through it
    trt.get_plugin_registry().load_library(sys.argv[1])
    report: dict[str, Any] = {}
    for plan in map(Path, sys.argv[2:]):
        log.errors.clear()
        try:
            report[plan.name] = run_plan(trt, log, plan)
        except Refused as error:
            report[plan.name] = {"ran": False, "error": str(error), "tensorrt": list(log.errors)}
    del builder
    print(json.dumps(report))
    return 0 if all(entry["ran"] for entry in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
