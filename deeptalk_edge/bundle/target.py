"""What a bundle is made for: the backends and the forms in which routed experts run.

Older bundles, profiles and command lines say `native` for what is `cpu` and `operators` today;
`current_name` reads both.
"""

from __future__ import annotations

from typing import Literal

TargetBackend = Literal["ort", "cpu", "tensorrt_rtx", "tensorrt"]
"""ONNX Runtime; the CPU with our own kernels; TensorRT-RTX, its engines built ahead anywhere; full
TensorRT, built on the device."""

BackendName = Literal["ort", "cpu", "tensorrt", "fake"]
"""What runs a bundle; `tensorrt` is both TensorRTs."""

MoeForm = Literal["split", "plugin", "operators"]
"""How routed experts run: outside the graphs, which are cut at every router; by our TensorRT
plugin; or in operators that TensorRT-RTX fuses by itself."""

_OLD_NAMES = {"backend": {"native": "cpu"}, "moe": {"native": "operators"}}


def backend_name(name: str) -> str:
    """A backend's name as a flag gives it."""
    return current_name("backend", name)


def current_name(field: str, name: str) -> str:
    """Today's name of a `backend` or a `moe` form."""
    return _OLD_NAMES[field].get(name, name)
