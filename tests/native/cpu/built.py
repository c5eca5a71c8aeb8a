"""What the native sources build: `kept` makes it once for an installation and all tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary
from native.cpu.build import kept


def library() -> CpuLibrary:
    """The library for this processor; skips the test where there is no compiler."""
    return CpuLibrary(library_place())


def library_place(*flags: str) -> Path:
    """Where it is, built with other flags than the usual if there are any; skips the test where
    there is no compiler."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on this machine: the native kernels were not checked")
    return kept(flags=flags or ("-O3",))


def sanitizer_runtimes() -> str:
    """What must be loaded before a program whose library is built with sanitizers."""
    found = (
        subprocess.run(
            ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )
    return " ".join(found)
