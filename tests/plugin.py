"""The TensorRT plugin for tests, built from its sources for one compute capability."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

SOURCE = ROOT / "native/tensorrt_plugin"


def build_plugin(folder: Path) -> Path:
    """Build the library in `folder`; skips the test if this machine cannot."""
    for tool in ("nvcc", "cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine: the TensorRT plugin was not built")
    configure = ["cmake", "-S", str(SOURCE), "-B", str(folder), "-G", "Ninja"]
    configure += ["-DDT_ARCHITECTURES=86", f"-DPython3_EXECUTABLE={sys.executable}"]
    for command in (configure, ["cmake", "--build", str(folder), "-j", "1"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "libdt_moe_plugin.so"
