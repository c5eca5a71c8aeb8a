"""A verb parses a checkpoint's config files once and hands on what they say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import BinaryIO

import pytest

from deeptalk_edge import cli, files, schema
from deeptalk_edge.checkpoint.config import CONFIG, GENERATION_CONFIG
from tests.places import TINY
from tests.training.toys import recipe_changes, write_toy_checkpoint, write_toy_data

FILES = (CONFIG, GENERATION_CONFIG, f"audio_encoder/{CONFIG}", f"snac/{CONFIG}")


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """How often each file was opened to be parsed; hashing a bundle's inputs does not count."""
    counted: Counter[Path] = Counter()
    open_input = files.open_input

    def counting(path: Path) -> BinaryIO:
        counted[path] += 1
        return open_input(path)

    monkeypatch.setattr(schema, "open_input", counting)
    return counted


@pytest.mark.parametrize(
    "words",
    [
        ("export", str(TINY), "--device", "cpu-int8", "-o", "{out}"),
        ("export", str(TINY), "--device", "cpu-int8", "--dry-run"),
        ("plan", "--device", "orin-nano-8gb", "--checkpoint", str(TINY)),
    ],
)
def test_export_and_plan_parse_each_config_file_once(
    words: tuple[str, ...], parsed: Counter[Path], tmp_path: Path
) -> None:
    assert cli.main([word.format(out=tmp_path / "out") for word in words]) == 0
    assert {name: parsed[TINY / name] for name in FILES} == dict.fromkeys(FILES, 1)


def test_a_training_run_parses_its_checkpoints_config_once(
    parsed: Counter[Path], tmp_path: Path
) -> None:
    """With a reference beside the model and a save every second step."""
    checkpoint = write_toy_checkpoint(tmp_path / "checkpoint")
    changes = recipe_changes(
        checkpoint, write_toy_data(tmp_path / "data"), tmp_path / "run", task="TQA"
    )
    flags = [word for change in changes for word in ("--set", change)]
    assert cli.main(["train", "distil", *flags]) == 0
    assert parsed[checkpoint / CONFIG] == 1
