"""What the sources build, kept by their hash: every test run after the first finds it made."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary
from native.cpu.build import SOURCES, build
from tests.places import ROOT

_PLACE = ROOT / "build" / "native_tests"


def library() -> CpuLibrary:
    """The library for this processor; skips the test where there is no compiler."""
    return CpuLibrary(library_place())


def library_place(*flags: str) -> Path:
    """Where it is, built with other flags than the usual if there are any; skips the test where
    there is no compiler."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine: the native kernels were not checked")
    place = _PLACE / _version(compiler, *flags) / "libdeeptalk_cpu.so"
    return place if place.is_file() else build(place, compiler, flags or ("-O3",))


def sanitizer_runtimes() -> str:
    """What must be loaded before a program whose library is built with sanitizers."""
    found = (
        subprocess.run(
            ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    )
    return " ".join(found)


def check_program(compiler: str, *flags: str) -> Path:
    """native/cpu/check.cpp and all that it checks, as a program."""
    place = _PLACE / _version(compiler, *flags) / "check"
    return place if place.is_file() else build(place, compiler, flags, is_check=True)


def _version(*choices: str) -> str:
    digest = hashlib.sha256(repr(choices).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
