"""The wheels that `make wheels` leaves in dist/."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest

from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary
from native.cpu.build import SOURCES
from tests.places import ROOT

DIST = ROOT / "dist"
LIBRARY = "deeptalk_edge/libdeeptalk_cpu.so"
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}

pytestmark = pytest.mark.slow


@pytest.fixture(params=list(ELF_MACHINES))
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def wheel(arch: str) -> ZipFile:
    changed = max(path.stat().st_mtime for path in SOURCES.iterdir())
    for path in DIST.glob(f"deeptalk_edge-*-py3-none-manylinux_2_17_{arch}.whl"):
        if path.stat().st_mtime > changed:
            return ZipFile(path)
    pytest.skip(f"no wheel for {arch} of these sources in dist/: `make wheels` builds it")


def test_a_wheels_library_is_for_the_processor_and_glibc_of_its_name(
    arch: str, wheel: ZipFile
) -> None:
    library = wheel.read(LIBRARY)
    assert library[:4] == b"\x7fELF"
    assert int.from_bytes(library[18:20], "little") == ELF_MACHINES[arch]
    versions = {tuple(map(int, found)) for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", library)}
    assert versions
    assert max(versions) <= (2, 17)
    assert not re.search(rb"lib(std)?c\+\+\.so", library)


def test_a_wheels_library_computes_what_the_references_say(
    arch: str, wheel: ZipFile, library: CpuLibrary, tmp_path: Path
) -> None:
    is_foreign = arch != platform.machine()
    compiler = shutil.which(f"{arch}-linux-gnu-g++" if is_foreign else "c++")
    emulator = shutil.which(f"qemu-{arch}") if is_foreign else "env"
    if compiler is None or emulator is None:
        pytest.skip(f"needs Debian's g++-{arch}-linux-gnu and qemu-user: the wheel was not run")
    shipped, program = wheel.extract(LIBRARY, tmp_path), tmp_path / "check"
    subprocess.run([compiler, SOURCES / "check.cpp", shipped, "-o", program], check=True)
    roots = ["-L", f"/usr/{arch}-linux-gnu"] if is_foreign else []
    done = subprocess.run([emulator, *roots, program, "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "portable: 1 rounds" in done.stdout
    if not is_foreign:  # the wheel's compiler is another one than the tests'
        assert all(f"{path}: 1 rounds" in done.stdout for path in library.path_names)
