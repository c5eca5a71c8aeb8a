"""Engines computed by torch on a real GPU, which tier 2 of the GPU check runs instead of TensorRT.

It is called when an execution context would launch its kernels, with that context's stream and
bound addresses. Torch allocates from one private pool per stream, so that a captured graph keeps
its addresses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deeptalk_edge.bench.gpu.moe_library import MoeCall, MoeConfig, MoeLibrary, build_cuda
from deeptalk_edge.bench.gpu.torch_program import TorchProgram, at


class TorchEngines:
    """Computes programs of the emulated TensorRT on a GPU."""

    def __init__(self, folder: Path, sm: int) -> None:
        """Build the plugin's kernels for the GPU into `folder`."""
        self._library = MoeLibrary(build_cuda(folder, sm))
        self._programs: dict[int, TorchProgram] = {}
        self._pools: dict[int, Any] = {}
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False

    def __call__(
        self, program: Any, stream: int, shapes: dict[str, tuple[int, ...]], addresses: Any
    ) -> None:
        """Launch a run of an emulated engine's graph."""
        if id(program) not in self._programs:
            self._programs[id(program)] = TorchProgram(program.model, "cuda", self._run_moe)
        if stream not in self._pools:
            self._pools[stream] = torch.cuda.MemPool()
        outside: Any = torch.cuda.ExternalStream(stream)  # type: ignore[no-untyped-call, unused-ignore]
        with torch.cuda.stream(outside), torch.cuda.use_mem_pool(self._pools[stream]):
            feeds = {
                name: at(addresses[name], shapes.get(name, shape), _numpy(kind), "cuda")
                for name, (mode, kind, shape) in program.io.items()
                if mode.name == "INPUT"
            }
            for name, found in self._programs[id(program)].run(feeds).items():
                kind = program.io[name][1]
                at(addresses[name], found.shape, _numpy(kind), "cuda").copy_(found)

    def _run_moe(self, a: dict[str, Any], given: Any) -> tuple[Tensor, Tensor]:
        x, ids, weights, table, arena = given
        config = MoeConfig(
            weight_dtype=a["weight_dtype"].decode(),
            group=a["group"] or None,
            activation_dtype="float16",
            width=a["width"],
            ffn_width=a["ffn_width"],
            num_experts=a["num_experts"],
            top_k=a["top_k"],
        )
        tokens = x.numel() // x.shape[-1]
        out = torch.empty_like(x)
        missing = torch.empty(1, dtype=torch.int32, device=x.device)
        size = self._library.workspace_bytes(config, tokens)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        call = MoeCall(
            tokens=tokens,
            num_slots=len(arena),
            x=x.data_ptr(),
            topk_ids=ids.data_ptr(),
            topk_weights=weights.data_ptr(),
            slot_table=table.data_ptr(),
            slot_arena=arena.data_ptr(),
            out=out.data_ptr(),
            missing=missing.data_ptr(),
            workspace=workspace.data_ptr(),
        )
        self._library.enqueue(config, call, torch.cuda.current_stream().cuda_stream)
        return out, missing


def _numpy(kind: Any) -> np.dtype[Any]:
    from tests.runtime.backends.tensorrt.emulated_tensorrt import nptype

    found: np.dtype[Any] = np.dtype(nptype(kind))
    return found
