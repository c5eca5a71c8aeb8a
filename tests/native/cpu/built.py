"""Builds of the C++ sources, cached by their hash, so that later test runs reuse them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from deeptalk_edge.runtime.backends.cpu import library as library_module
from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary
from native.cpu.build import SOURCES, build
from tests.places import ROOT

_PLACE = ROOT / "build" / "native_tests"


def library() -> CpuLibrary:
    """The library for this processor; skips the test without a compiler."""
    return CpuLibrary(library_place())


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runtime load the library that the sources build; skips without a compiler."""
    monkeypatch.setattr(library_module, "LIBRARY", library_place())


def library_place(*flags: str) -> Path:
    """Path of the library, built with extra flags if there are any; skips the test without a
    compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine: the native kernels were not checked")
    place = _PLACE / _version(compiler, *flags) / "libdeeptalk_cpu.so"
    return place if place.is_file() else build(place, compiler, flags or ("-O3",))


def sanitizer_runtimes() -> str:
    """Library to preload before a program with a sanitized library."""
    found = (
        subprocess.run(
            ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )
    return " ".join(found)


def check_program(compiler: str, *flags: str) -> Path:
    """The check program, built from native/cpu/check.cpp and the kernels."""
    place = _PLACE / _version(compiler, *flags) / "check"
    return place if place.is_file() else build(place, compiler, flags, is_check=True)


def _version(*choices: str) -> str:
    digest = hashlib.sha256(repr(choices).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
