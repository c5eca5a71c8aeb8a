"""The runtime loads no training packages, and the command line loads packages late."""

from __future__ import annotations

import subprocess
import sys

import pytest

TRAINING_STACK = {"torch", "onnx", "transformers"}


def modules_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(finished.stdout.split())


@pytest.mark.parametrize(
    "module",
    [
        "conversation",
        "commands.run",
        "commands.bundle",
        "commands.sound",
        "backends.open",
        "backends.fake",
        "measure",
        "audio.pyaudio_port",
    ],
)
def test_the_runtime_loads_no_training_stack(module: str) -> None:
    loaded = modules_after(f"import deeptalk_edge.runtime.{module}")
    assert not loaded & TRAINING_STACK
    assert not {name for name in loaded if name.startswith("deeptalk_edge.training")}


@pytest.mark.parametrize("argv", [[], ["run"], ["bundle"], ["sound"], ["profile"], ["routes"]])
def test_help_loads_neither_numpy_nor_a_backend(argv: list[str]) -> None:
    code = "import contextlib, io; from deeptalk_edge.cli import main\n"
    code += f"with contextlib.redirect_stdout(io.StringIO()): assert main({[*argv, '--help']}) == 0"
    assert not modules_after(code) & {"numpy", "onnxruntime", "tokenizers", "soxr"}
