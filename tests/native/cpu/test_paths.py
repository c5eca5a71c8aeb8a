"""The kernel paths of a processor."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary

_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}
FLAGS = {
    "avx512-bf16": _AVX512 | {"avx512_bf16"},
    "avx512": _AVX512,
    "avx512-intel": _AVX512,
    "avx2-vnni": _AVX2 | {"avx_vnni"},
    "avx2": _AVX2,
    "portable": set[str](),
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86's features")
def test_the_paths_are_those_whose_instructions_linux_lists(library: CpuLibrary) -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = set(next(line for line in lines if line.startswith("flags")).split())
    expected = [path for path, flags in FLAGS.items() if flags <= found]
    if any(line.split() == ["vendor_id", ":", "GenuineIntel"] for line in lines):
        expected.sort(key="avx512-intel".__ne__)  # Intel's path first
    assert library.path_names == expected
