"""A killed run resumes at its last checkpoint; failures are reported and keep the last state."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from deeptalk_edge.errors import ArtifactError, DoesNotFit, SettingsError, TrainingFailed
from deeptalk_edge.training.expert_split import save_split
from deeptalk_edge.training.journal import read_journal
from deeptalk_edge.training.stages.recipe import read_recipe
from deeptalk_edge.training.stages.run import run_recipe
from deeptalk_edge.training.stages.run_directory import RunDirectory
from tests.places import ROOT
from tests.training.toys import (
    parameters_of,
    recipe_changes,
    write_toy_checkpoint,
    write_toy_data,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "checkpoint")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_toy_data(tmp_path / "data")


def _run(
    checkpoint: Path,
    data: Path,
    output: Path,
    *more: str,
    name: str = "joint",
    resume: bool = False,
) -> Path:
    changes = [*recipe_changes(checkpoint, data, output), "saving.dtype=float32", *more]
    return run_recipe(read_recipe(name, changes), resume=resume)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_uninterrupted_ones_weights_bit_for_bit(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """kill -9 between two checkpoints, two data workers included."""
    whole = parameters_of(_run(checkpoint, data, tmp_path / "whole"))
    cut = tmp_path / "cut"
    changes = [
        *recipe_changes(checkpoint, data, cut),
        "saving.dtype=float32",
        "data.workers=2",
    ]
    words = [word for change in changes for word in ("--set", change)]
    command = [sys.executable, "-m", "deeptalk_edge.cli", "train", "joint", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 240
        while len(_steps_logged(cut)) < 3 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (cut / "step-000002").is_dir()
    assert not (cut / "final").exists()
    done = subprocess.run([*command, "--resume"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resumed = parameters_of(cut / "final")
    assert whole.keys() == resumed.keys()
    for name, weights in whole.items():
        assert torch.equal(weights, resumed[name]), name
    assert _steps_logged(cut) == [1, 2, 3, 4, 5, 6]


def _steps_logged(output: Path) -> list[int]:
    journal = output / "journal.jsonl"
    entries = read_journal(journal) if journal.is_file() else []
    return [entry["step"] for entry in entries if entry["kind"] == "step"]


def test_adapters_resume_bit_for_bit(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    lora = ("lora.rank=2", "saving.every=3")
    whole = parameters_of(_run(checkpoint, data, tmp_path / "whole", *lora, name="finetune"))
    cut = tmp_path / "cut"
    _run(checkpoint, data, cut, *lora, name="finetune")
    for gone in ("step-000006", "final"):  # like a kill after the third step
        subprocess.run(["rm", "-r", str(cut / gone)], check=True)
    resumed = parameters_of(_run(checkpoint, data, cut, *lora, name="finetune", resume=True))
    before = parameters_of(checkpoint)
    for name, weights in whole.items():
        assert torch.equal(weights, resumed[name]), name
    moved = {name for name in whole if not torch.equal(whole[name], before[name])}
    assert "model.layers.1.self_attn.q_proj.weight" in moved
    assert "model.embed_tokens.weight" not in moved
    assert not any(".mlp.experts.4." in name for name in moved if ".layers.1." in name)


def test_resuming_with_changed_data_is_refused(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    _run(checkpoint, data, tmp_path / "run")
    lines = data.read_text().splitlines()
    data.write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ArtifactError, match="the data has changed"):
        _run(checkpoint, data, tmp_path / "run", resume=True)


def test_resuming_another_recipe_is_refused(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    _run(checkpoint, data, tmp_path / "run")
    with pytest.raises(ArtifactError, match="another recipe"):
        _run(checkpoint, data, tmp_path / "run", "loss.text=2.0", resume=True)


def test_a_directory_with_a_run_is_not_written_over(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    _run(checkpoint, data, tmp_path / "run")
    with pytest.raises(SettingsError, match="--resume"):
        _run(checkpoint, data, tmp_path / "run")


def test_a_disk_that_fills_leaves_the_last_checkpoint_whole(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files simulates a full disk, from the second checkpoint on."""
    output = tmp_path / "run"
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = RunDirectory.save

    def save_then_fill(directory: RunDirectory, *state: Any) -> None:
        save(directory, *state)
        size = (output / "step-000002" / "model.safetensors").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))

    monkeypatch.setattr(RunDirectory, "save", save_then_fill)
    try:
        with pytest.raises(DoesNotFit, match=r"cannot be written"):
            _run(checkpoint, data, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert [path.name for path in output.glob("*step-*")] == ["step-000002"]
    monkeypatch.setattr(RunDirectory, "save", save)
    _run(checkpoint, data, output, resume=True)  # once there is room


def test_a_split_of_another_layer_count_is_refused(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    save_split([[0, 1]], tmp_path / "split.json")
    with pytest.raises(SettingsError, match="has 1 lists of audio experts, this model 2"):
        _run(
            checkpoint,
            data,
            tmp_path / "run",
            f"experts={tmp_path / 'split.json'}",
            name="audio_experts",
        )


def test_a_batch_with_nan_stops_the_run_and_names_the_sample(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deeptalk_edge.training.data import dataset, samples

    hear = samples.heard_log_mel
    calls = []

    def broken(clips: object, spec: object) -> object:
        calls.append(clips)
        mel = hear(clips, spec)  # type: ignore[arg-type]
        return mel * float("nan") if len(calls) > 24 else mel

    monkeypatch.setattr(dataset, "heard_log_mel", broken)
    with pytest.raises(TrainingFailed, match=r"step \d: the losses are .*data\.jsonl:\d+"):
        _run(checkpoint, data, tmp_path / "run")
    assert (tmp_path / "run" / "step-000002").is_dir()


def test_a_broken_line_is_named_and_refused_or_counted(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    with data.open("a") as file:
        file.write('{"conversations": [\n')
    with pytest.raises(SettingsError, match=r"1 of 13 samples are bad.*data\.jsonl:13"):
        _run(checkpoint, data, tmp_path / "run")
    _run(checkpoint, data, tmp_path / "counted", "data.bad_share=0.1")


def test_a_recipe_for_another_shape_of_checkpoint_is_refused(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="num_audio_experts = 9: expected 2 to 5"):
        _run(checkpoint, data, tmp_path / "run", "num_audio_experts=9", name="moextend")


STOPS_EARLY = (
    "data.held_out=0.4",
    "optimiser.num_steps=40",
    "saving.every=1",
    "saving.evaluate_every=1",
    "saving.patience=2",
    "saving.keep=1",
    "explosion=0.0",
)


def test_scores_that_get_no_better_stop_the_run(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    _run(checkpoint, data, output, *STOPS_EARLY, "optimiser.learning_rate=1e-30")
    kinds = [entry["kind"] for entry in read_journal(output / "journal.jsonl")]
    assert kinds.count("evaluation") == 3


def test_the_run_stops_early_and_goes_back_to_the_best(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    final = _run(
        checkpoint,
        data,
        output,
        *STOPS_EARLY,
        "optimiser.learning_rate=0.5",
    )
    judged = [e for e in read_journal(output / "journal.jsonl") if e["kind"] == "evaluation"]
    best = min(judged, key=lambda entry: entry["score"])
    assert len(judged) == judged.index(best) + 3 < 40
    kept = {path.name for path in output.glob("step-*")}
    assert f"step-{best['step']:06}" in kept
    weights = parameters_of(output / f"step-{best['step']:06}")
    for name, tensor in parameters_of(final).items():
        assert torch.equal(tensor, weights[name])
    facts = json.loads((output / f"step-{best['step']:06}" / "trainer.json").read_text())
    assert facts["score"] == best["score"]
