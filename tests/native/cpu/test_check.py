"""The kernels' own test program: on Arm under qemu, and under sanitizers."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.native.cpu.built import check_program


@pytest.mark.slow
def test_neon_computes_what_the_references_say() -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu and qemu-user: NEON was not checked")
    program = check_program(compiler, "-O2", "-static")
    command = [emulator, "-cpu", "max", str(program), "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "neon-dotprod: 2 rounds" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers: str) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    program = check_program(
        compiler, "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"
    )
    done = subprocess.run([str(program), "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
