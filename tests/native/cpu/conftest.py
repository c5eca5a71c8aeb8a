"""Every kernel path of this processor."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

from deeptalk_edge.runtime.backends.cpu.library import CpuContext, CpuLibrary
from tests.native.cpu import built

_X86_PATHS = ("avx512-bf16", "avx512", "avx512-intel", "avx2-vnni", "avx2")
_FAST_PATHS = _X86_PATHS if platform.machine() == "x86_64" else ("neon-i8mm", "neon-dotprod")


@pytest.fixture(scope="session")
def library() -> CpuLibrary:
    return built.library()


@pytest.fixture(params=(*_FAST_PATHS, "portable"))
def context(library: CpuLibrary, request: pytest.FixtureRequest) -> Iterator[CpuContext]:
    """Every kernel path in turn, on two threads."""
    if request.param not in library.path_names:
        pytest.skip(f"this processor or compiler has no {request.param}")
    context = CpuContext(library, path=request.param, threads=2)
    yield context
    context.close()
