"""Two processes by FSDP have one process's losses, and any number can resume their checkpoints."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deeptalk_edge.checkpoint.reader import Checkpoint, expected_tensors
from deeptalk_edge.training.journal import read_journal
from deeptalk_edge.training.stages.recipe import read_recipe
from deeptalk_edge.training.stages.run import run_recipe
from tests.places import ROOT
from tests.training.toys import (
    parameters_of,
    recipe_changes,
    write_toy_checkpoint,
    write_toy_data,
)

TOLERANCE = 1e-4

pytestmark = pytest.mark.slow  # each case starts two processes of torch


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("toy")
    return write_toy_checkpoint(place / "checkpoint"), write_toy_data(place / "data")


def _start(
    toy: tuple[Path, Path], output: Path, count: int, *more: str, resume: bool = False
) -> list[subprocess.Popen[str]]:
    words = [word for change in _changes(toy, output, *more) for word in ("--set", change)]
    command = [sys.executable, "-m", "deeptalk_edge.cli", "train", "joint", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    return [
        subprocess.Popen(
            [*command, *(["--resume"] if resume else [])],
            env={**env, "RANK": str(rank), "WORLD_SIZE": str(count)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def _changes(toy: tuple[Path, Path], output: Path, *more: str) -> list[str]:
    return [*recipe_changes(*toy, output), "saving.dtype=float32", *more]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _finish(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said


def _losses(output: Path) -> dict[int, dict[str, float]]:
    entries = read_journal(output / "journal.jsonl")
    return {entry["step"]: entry["losses"] for entry in entries if entry["kind"] == "step"}


@pytest.fixture(scope="module")
def alone(toy: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    run_recipe(read_recipe("joint", _changes(toy, output)), resume=False)
    return output


@pytest.fixture(scope="module")
def together(toy: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("together") / "run"
    _finish(_start(toy, output, 2))
    return output


def test_two_processes_have_the_loss_curve_of_one(alone: Path, together: Path) -> None:
    one, two = _losses(alone), _losses(together)
    assert sorted(one) == sorted(two) == [1, 2, 3, 4, 5, 6]
    for step, losses in one.items():
        assert losses.keys() == two[step].keys()
        for name, loss in losses.items():
            assert abs(loss - two[step][name]) < TOLERANCE, (step, name)


def test_a_sharded_run_writes_whole_tensors_in_the_official_layout(together: Path) -> None:
    checkpoint = Checkpoint.open(together / "final")
    assert sorted(expected_tensors(checkpoint.spec)) == sorted(checkpoint._weights.shapes)


def test_another_number_of_processes_can_resume_a_run_of_two(
    toy: tuple[Path, Path], together: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    subprocess.run(["cp", "-r", str(together), str(cut)], check=True)
    for gone in ("final", "step-000006"):
        subprocess.run(["rm", "-r", str(cut / gone)], check=True)
    _finish(_start(toy, cut, 1, resume=True))
    whole = parameters_of(together / "final")
    for name, tensor in parameters_of(cut / "final").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-4)


def test_when_a_process_dies_the_other_stops_with_its_number(
    toy: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    first, second = _start(toy, output, 2, "optimiser.num_steps=100000", "saving.every=100000")
    journal = output / "journal.jsonl"
    end = time.monotonic() + 240
    while not journal.is_file() and first.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    second.send_signal(signal.SIGKILL)
    _, said = first.communicate(timeout=120)
    second.communicate()
    assert first.returncode == 1
    assert "process 1 of 2 has died" in said
