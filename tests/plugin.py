"""The TensorRT plugin for tests, built for one compute capability, and its kernels for the host.

Both are kept under build/ by a hash of compiler and sources: one process builds, others wait.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from deeptalk_edge.bench.gpu import moe_library
from native.cpu.build import made_once
from tests.places import ROOT

SOURCE = ROOT / "native/tensorrt_plugin"
_UNOPTIMISED = "-O0;-Xcicc;-O0;-Xptxas;-O0"  # 9 s of nvcc instead of 18; no kernel runs here


def built_plugin() -> Path:
    """Build the plugin; skips the test if this machine cannot."""
    for tool in ("nvcc", "cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine: the TensorRT plugin was not built")
    return _kept("libdt_moe_plugin.so", "nvcc", _build)


def built_for_host() -> Path:
    """The kernels as plain C++; skips the test where there is no compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine: the kernels' arithmetic was not checked")

    def build(folder: Path) -> Path:
        return moe_library.build_host(folder, compiler)

    return _kept("libdt_moe_host.so", compiler, build)


def _kept(name: str, compiler: str, build: Callable[[Path], Path]) -> Path:
    digest = hashlib.sha256(_said_by(compiler, "--version").encode())
    sources = sorted(path for path in SOURCE.iterdir() if path.is_file())
    for path in (*sources, Path(__file__), Path(moe_library.__file__)):
        digest.update(path.read_bytes())

    def make(place: Path) -> None:
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            build(Path(folder)).replace(place)

    return made_once(ROOT / "build" / "plugin_tests" / digest.hexdigest()[:16] / name, make)


def _build(folder: Path) -> Path:
    configure = ["cmake", "-S", str(SOURCE), "-B", str(folder), "-G", "Ninja"]
    configure += ["-DDT_ARCHITECTURES=86", f"-DPython3_EXECUTABLE={sys.executable}"]
    _said_by(*configure, f"-DDT_OPTIMISED={_UNOPTIMISED}")
    _said_by("cmake", "--build", str(folder), "-j", "1")
    return folder / "libdt_moe_plugin.so"


def _said_by(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
