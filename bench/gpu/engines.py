"""Second step of the GPU check: do TensorRT-RTX plans with our plugin load, run and compute
correctly?

    python -m deeptalk_edge.bench.gpu.engines PLUGIN.so build/gpu_plans/*.plan*

It needs tensorrt_rtx (`pip install tensorrt-rtx-cu13`) and a CUDA PyTorch. `bench gpu_plans` builds
the plans on a machine without a GPU and writes an .npz of inputs and expected outputs for each. A
plan without an .npz runs on zeros with every slot absent. All plans are tried; one JSON line has
the results.
"""

from __future__ import annotations

import importlib.util
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

TOLERANCE = 2e-2
"""Tolerance in float16, as largest error over largest value; a wrong expert or slot gives 0.1 or
more."""

_TORCH = {
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FLOAT": torch.float32,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


class Refused(Exception):
    """TensorRT-RTX refused to load or run a plan."""


def run_plan(trt: Any, log: Any, plan: Path) -> dict[str, Any]:
    """Load a plan, run its first profile once and compare with its case, if it has one.

    Raises Refused.
    """
    case = read_case(plan.with_name(plan.name.partition(".")[0] + ".npz"))
    content = plan.read_bytes()
    if plan.suffix == ".xz":
        content = lzma.decompress(content)
    engine = trt.Runtime(log).deserialize_cuda_engine(content)
    if engine is None:
        raise Refused("deserialize_cuda_engine gave nothing")
    context = engine.create_execution_context()
    if context is None:
        raise Refused("create_execution_context gave nothing")
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    outputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        if name not in outputs:
            tensors[name] = input_tensor(engine, name, case)
            context.set_input_shape(name, tuple(tensors[name].shape))
    for name in outputs:  # the inputs' shapes give theirs
        shape = tuple(context.get_tensor_shape(name))
        tensors[name] = torch.zeros(shape, dtype=torch_dtype(engine, name), device="cuda")
    for name, tensor in tensors.items():
        context.set_tensor_address(name, tensor.data_ptr())
    if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
        raise Refused("execute_async_v3 failed")
    torch.cuda.synchronize()
    errors = {
        name: relative_error(tensors[name], case[f"expected_{name}"])
        for name in outputs
        if f"expected_{name}" in case
    }
    return {"ran": True, "right": all(e <= TOLERANCE for e in errors.values()), "errors": errors}


def input_tensor(engine: Any, name: str, case: dict[str, Array]) -> torch.Tensor:
    """Return an input of the case, or zeros and absent slots.

    The form without the plugin has one input for every array of an arena; all are bound to its one
    buffer.
    """
    dtype = torch_dtype(engine, name)
    device = "cpu" if engine.is_shape_inference_io(name) else "cuda"
    arena = name.partition(".")[0]
    if name in case:
        return torch.from_numpy(case[name]).to(device, dtype).contiguous()
    shape = tuple(engine.get_tensor_shape(name))
    if arena in case:
        buffer = torch.from_numpy(case[arena]).to(device)
        return buffer.view(dtype).reshape(len(buffer), *shape[1:])
    if -1 in shape:
        shape = tuple(engine.get_tensor_profile_shape(name, 0)[1])
    return torch.full(
        shape, -1 if arena.startswith("slot_table") else 0, dtype=dtype, device=device
    )


def torch_dtype(engine: Any, name: str) -> torch.dtype:
    """Raises Refused if torch has no such type."""
    kind = str(engine.get_tensor_dtype(name)).split(".")[-1]
    if kind not in _TORCH:
        raise Refused(f"{name}: torch has no {kind}")
    return _TORCH[kind]


def read_case(path: Path) -> dict[str, Array]:
    if not path.is_file():
        return {}
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def relative_error(found: torch.Tensor, expected: Array) -> float:
    """Largest absolute difference divided by the largest expected value."""
    values = found.cpu().double().numpy()
    return float(np.abs(values - expected).max() / (np.abs(expected).max() or 1.0))


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
    builder = trt.Builder(log)  # the registry gets its logger from it
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
    return 0 if all(entry.get("right") for entry in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
