"""Installs one emulated GPU at a time: CUDA's library and TensorRT's module by their names."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.target import MoeForm
from deeptalk_edge.devices.profile import DeviceProfile, load_profile
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from tests.places import ROOT, TINY
from tests.runtime.backends.tensorrt import emulated_cuda
from tests.runtime.backends.tensorrt.emulated_cuda import EmulatedCuda


@contextmanager
def tensorrt_module(
    folder: Path, version: str | None = None, *, name: str = "tensorrt"
) -> Iterator[None]:
    """Provide the emulated module, of any version, for this process and its children; `name` is
    `tensorrt` or `tensorrt_rtx`."""
    package = folder / (version or "modules") / name
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text(
        "from tests.runtime.backends.tensorrt.emulated_tensorrt import *\n"
        + (
            f"__version__ = {version!r}\n"
            if version
            else "from tests.runtime.backends.tensorrt.emulated_tensorrt import __version__\n"
        ),
        encoding="utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(package.parent))
        patch.setenv("PYTHONPATH", f"{package.parent}{os.pathsep}{ROOT}")
        patch.delitem(sys.modules, name, raising=False)
        try:
            yield
        finally:
            sys.modules.pop(name, None)


@contextmanager
def gpu(cuda: EmulatedCuda | None = None, **settings: Any) -> Iterator[EmulatedCuda]:
    """Replace libcudart by this emulation."""
    cuda = cuda or EmulatedCuda(**settings)
    load = ctypes.CDLL

    def open_library(name: Any, *args: Any, **kwargs: Any) -> Any:
        return cuda if str(name).startswith("libcudart") else load(name, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctypes, "CDLL", open_library)
        emulated_cuda.use(cuda)
        try:
            yield cuda
        finally:
            emulated_cuda.use(None)


def profile(moe: MoeForm, precision: str) -> DeviceProfile:
    """A Jetson AGX Orin's, with the tiny checkpoint in one precision."""
    orin = load_profile("agx-orin-64gb")
    parts = ("encoder", "decoder", "head", "codec", "kv_cache")
    changes: Any = dict.fromkeys(parts, precision)
    changes |= {"experts": "int8" if moe == "plugin" else precision, "expert_group": None}
    return replace(orin, moe=moe, precision=replace(orin.precision, **changes))


def build_plugin(folder: Path, *, sm: str = "87", ptx: str = "87", abi: int = 1) -> Path:
    """A library with the interface of libdt_moe_plugin.so; the emulator has the kernels."""
    folder.mkdir(parents=True, exist_ok=True)
    said = json.dumps({"abi": abi, "sm": sm, "ptx": ptx})
    source, library = folder / "plugin.c", folder / "libdt_moe_plugin.so"
    source.write_text(f"const char *dt_moe_build(void) {{ return {json.dumps(said)}; }}\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def export_engines(
    place: Path, form: DeviceProfile, plugin: Path | None = None, *, checkpoint: Path = TINY
) -> Bundle:
    """A bundle whose engines the emulated TensorRT built."""
    with tensorrt_module(place):
        export_bundle(checkpoint, place / "bundle", ExportSettings(profile=form, plugin=plugin))
    return Bundle.open(place / "bundle")
