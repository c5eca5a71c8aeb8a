"""The kernels' own test program: on Arm under qemu, and under sanitizers.

One round runs with all other tests; `make sanitize` makes the long runs.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from native.cpu.build import kept
from tests.native.cpu.built import library


def checked(*command: str | Path) -> list[str]:
    """The kernel paths that a run of the program reports."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.partition(":")[0] for line in done.stdout.splitlines()]


def sanitized(sanitizers: str, optimised: str) -> Path:
    """The program with the paths of this processor; sanitizers triple what a path takes to
    compile."""
    flags = (optimised, "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all")
    return kept(flags=flags, is_check=True, x86_paths=library().path_names)


@pytest.fixture
def emulator() -> str:
    found = shutil.which("qemu-aarch64")
    if found is None:
        pytest.skip("needs Debian's qemu-user: NEON was not checked")
    return found


@pytest.fixture
def arm_program() -> Path:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("needs Debian's g++-aarch64-linux-gnu: NEON was not checked")
    return kept(compiler, ("-O1", "-static"), is_check=True)


@pytest.mark.parametrize("rounds", ["1", pytest.param("10", marks=pytest.mark.slow)])
def test_neon_computes_what_the_references_say(
    emulator: str, arm_program: Path, rounds: str
) -> None:
    paths = checked(emulator, "-cpu", "max", arm_program, rounds)
    assert paths == ["neon-i8mm", "neon-dotprod", "portable"]


@pytest.mark.parametrize(
    ("processor", "paths"),
    [("cortex-a76", ["neon-dotprod", "portable"]), ("cortex-a72", ["portable"])],
)
def test_a_processor_is_offered_the_paths_that_it_runs(
    emulator: str, arm_program: Path, processor: str, paths: list[str]
) -> None:
    assert checked(emulator, "-cpu", processor, arm_program, "0") == paths


@pytest.mark.parametrize(
    ("sanitizers", "optimised", "rounds"),
    [
        ("address,undefined", "-O0", "1"),
        pytest.param("address,undefined", "-O1", "5", marks=pytest.mark.slow),
        pytest.param("thread", "-O1", "2", marks=pytest.mark.slow),
    ],
)
def test_sanitizers_find_nothing(sanitizers: str, optimised: str, rounds: str) -> None:
    assert checked(sanitized(sanitizers, optimised), rounds) == library().path_names


def test_sanitizers_find_nothing_whatever_the_arguments_say() -> None:
    program = sanitized("address,undefined", "-O0")
    best, *_ = checked(program, "0")
    assert checked(program, "hostile", "100", best) == [best]


@pytest.mark.slow
def test_sanitizers_find_nothing_on_any_path_whatever_the_arguments_say() -> None:
    assert "portable" in checked(sanitized("address,undefined", "-O1"), "hostile", "3000")
