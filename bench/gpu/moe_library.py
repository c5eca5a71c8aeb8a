"""The MoE kernels as a shared library, built by a host compiler or nvcc and called through ctypes.

Tests and the GPU check share it, so the card runs the same source lines that the tests check.
Pointers are plain addresses: of numpy arrays in the host build, of CUDA tensors in nvcc's.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deeptalk_edge.bundle.expert_record import ExpertDtype, RecordFormat

SOURCE = Path(__file__).resolve().parents[2] / "native" / "tensorrt_plugin"

ActivationDtype = Literal["float16", "bfloat16"]

# Values of `DtWeightKind` and `DtActivationKind` in moe_launch.h, which refuses -1.
_WEIGHT_KINDS: dict[tuple[ExpertDtype, int | None], int] = {
    ("float16", None): 0,
    ("bfloat16", None): 1,
    ("int8", None): 2,
    ("int4", 32): 3,
    ("int4", 64): 4,
    ("int4", 128): 5,
}
_ACTIVATION_KINDS: dict[str, int] = {"float16": 0, "bfloat16": 1}


class RecordLayout(ctypes.Structure):
    """Byte offsets in a record, as the C++ side computes them."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("gate_up", "down", "gate_up_scales", "down_scales", "record_bytes")
    )


class _Config(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_int32)
        for name in (
            "weight_kind",
            "activation_kind",
            "width",
            "ffn_width",
            "num_experts",
            "top_k",
        )
    )


class _Call(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x",
                "topk_ids",
                "topk_weights",
                "slot_table",
                "slot_arena",
                "carry",
                "out",
                "missing",
                "workspace",
            )
        ),
        *((name, ctypes.c_int32) for name in ("tokens", "num_slots", "float_out", "overlap")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Values that do not change between calls of one layer."""

    weight_dtype: ExpertDtype
    group: int | None
    activation_dtype: ActivationDtype
    width: int
    ffn_width: int
    num_experts: int
    top_k: int

    @property
    def record_format(self) -> RecordFormat:
        return RecordFormat(
            dtype=self.weight_dtype, group=self.group, width=self.width, ffn_width=self.ffn_width
        )

    def _struct(self) -> _Config:
        return _Config(
            _WEIGHT_KINDS.get((self.weight_dtype, self.group), -1),
            _ACTIVATION_KINDS.get(self.activation_dtype, -1),
            self.width,
            self.ffn_width,
            self.num_experts,
            self.top_k,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeCall:
    """One call: sizes, then addresses of dense arrays; 0 for no carry."""

    tokens: int
    num_slots: int
    x: int
    topk_ids: int
    topk_weights: int
    slot_table: int
    slot_arena: int
    out: int
    missing: int
    workspace: int
    carry: int = 0
    float_out: bool = False
    overlap: bool = False


class MoeLibrary:
    """A built library."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.dt_moe_refusal.restype = ctypes.c_char_p
        self._library.dt_moe_record_layout.restype = RecordLayout
        self._library.dt_moe_workspace_bytes.restype = ctypes.c_int64

    def refusal(self, config: MoeConfig) -> str | None:
        """Return the reason why the kernels do not support the layer, or None if they do."""
        text: bytes | None = self._library.dt_moe_refusal(ctypes.byref(config._struct()))
        return None if text is None else text.decode()

    def record_layout(self, config: MoeConfig) -> RecordLayout:
        layout = self._library.dt_moe_record_layout(ctypes.byref(config._struct()))
        assert isinstance(layout, RecordLayout)
        return layout

    def workspace_bytes(self, config: MoeConfig, tokens: int) -> int:
        return int(self._library.dt_moe_workspace_bytes(ctypes.byref(config._struct()), tokens))

    def enqueue(self, config: MoeConfig, call: MoeCall, stream: int = 0) -> None:
        """Start the layer; the host build has finished it when this returns.

        Raises RuntimeError with CUDA's error number if a launch fails.
        """
        values = {name: getattr(call, name) for name, *_ in _Call._fields_}
        error = self._library.dt_moe_enqueue(
            ctypes.byref(config._struct()), ctypes.byref(_Call(**values)), ctypes.c_void_p(stream)
        )
        if error:
            raise RuntimeError(f"dt_moe_enqueue: cudaError {error}")


def build_host(folder: Path, compiler: str = "g++") -> Path:
    """Compile the kernels as plain C++; returns the library's path."""
    command = [compiler, "-x", "c++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-shared", "-fPIC", "-fvisibility=hidden"]
    return _build(command, folder / "libdt_moe_host.so")


def build_cuda(folder: Path, sm: int) -> Path:
    """Compile the kernels for one compute capability, such as 90; returns the library's path."""
    command = ["nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{sm},code=sm_{sm}"]
    command += ["-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "-cudart=static"]
    return _build(command, folder / f"libdt_moe_sm{sm}.so")


def _build(command: list[str], target: Path) -> Path:
    command = [*command, str(SOURCE / "moe_launch.cu"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return target
