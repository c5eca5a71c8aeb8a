"""The messages and actions of `make` with missing parts, with a Python that logs calls."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.places import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")

_PYTHON = """#!/bin/sh
case "$*" in *"import pyaudio"*) exit 1;; esac
printf '%s|' "$@" >> {calls}
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A complete environment without PyAudio."""
    place = tmp_path / "venv"
    (place / "bin").mkdir(parents=True)
    (place / "bin/python").write_text(_PYTHON.format(calls=tmp_path / "calls"))
    (place / "bin/python").chmod(0o755)
    for name in (".dev", ".device"):
        (place / name).touch()
    return place


def make(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("make") or "make", "--no-print-directory", *words]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_without_portaudio_the_tests_continue_after_one_line(venv: Path) -> None:
    done = make("sound", f"VENV={venv}", "HAS_PORTAUDIO=false")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines() == [
        "no PyAudio, the sound tests are skipped: apt install portaudio19-dev gcc python3-dev, "
        "then again"
    ]
    assert not (venv.parent / "calls").exists()


def test_pyaudio_is_built_if_portaudio_is_installed(venv: Path) -> None:
    done = make("sound", f"VENV={venv}", "HAS_PORTAUDIO=true")
    assert (done.returncode, done.stderr) == (0, "")
    assert "pip|install|" in (venv.parent / "calls").read_text()
    assert ".[sound]|" in (venv.parent / "calls").read_text()


@pytest.mark.parametrize(
    ("wav", "asked"),
    [
        ("my file.wav", "--wav|{}/my file.wav|"),
        ('it\'s $5 "new".wav', '--wav|{}/it\'s $5 "new".wav|'),
        ("one.wav {}/two.wav", "--wav|{}/one.wav|{}/two.wav|"),
    ],
)
def test_the_demo_takes_any_name_of_a_recording(
    wav: str, asked: str, venv: Path, tmp_path: Path
) -> None:
    names = ["one.wav", "two.wav"] if wav.startswith("one") else [wav]
    for name in [*names, "manifest.json"]:
        (tmp_path / name).touch()
    place = f"{tmp_path}/{wav.format(tmp_path)}"
    done = make("demo", f"VENV={venv}", f"KERNEL_BUNDLE={tmp_path}", WAV=place)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "calls").read_text().endswith(asked.format(*[tmp_path] * 2))


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("nvcc", "nvcc is not on the PATH; install the CUDA"),
        ("aarch64-linux-gnu-g++", "install g++-a"),
    ],
)
def test_the_plugin_names_the_compiler_that_is_missing(
    missing: str, named: str, tmp_path: Path
) -> None:
    for tool in {"uname", "nvcc", "cmake", "aarch64-linux-gnu-g++"} - {missing}:
        (tmp_path / tool).symlink_to(shutil.which(tool) or shutil.which("true") or "/bin/true")
    done = make("plugin", PATH=f"{tmp_path}", MAKE=shutil.which("make") or "make")
    assert done.returncode == 2
    assert named in done.stderr.splitlines()[0]
