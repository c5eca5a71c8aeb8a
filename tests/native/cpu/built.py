"""Builds of the native sources: `kept` makes each once for an installation and all tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from deeptalk_edge.runtime.backends.cpu import library as library_module
from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary
from native.cpu.build import kept


def library() -> CpuLibrary:
    """The library for this processor; skips the test without a compiler."""
    return CpuLibrary(library_place())


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runtime load the library that the sources build; skips without a compiler."""
    monkeypatch.setattr(library_module, "LIBRARY", library_place())


def library_place(*flags: str) -> Path:
    """Path of the library, built with other flags than the usual if there are any; skips the test
    without a compiler."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on this machine: the native kernels were not checked")
    return kept(flags=flags or ("-O3",))


def sanitizer_runtimes() -> str:
    """Library to preload before a program with a sanitized library."""
    found = (
        subprocess.run(
            ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )
    return " ".join(found)
