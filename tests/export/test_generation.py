"""The checkpoint's generation settings reach the bundle; invalid ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deeptalk_edge.bundle.manifest import Generation
from deeptalk_edge.checkpoint.config import CheckpointConfig
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.export.generation import read_generation
from tests.specs import PLAIN


def _write(checkpoint: Path, fields: dict[str, object]) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps(fields), encoding="utf-8")


def _generation(checkpoint: Path) -> Generation:
    return read_generation(CheckpointConfig(directory=checkpoint, content={}, model=PLAIN))


def test_generation_follows_the_checkpoint(tmp_path: Path) -> None:
    chosen = {"system": "Be brief.", "speaker": "M29", "mode": "single", "audio_top_k": 7}
    chosen |= {"max_turns": 3, "fold_typed": True}
    _write(tmp_path, {"temperature": 0.3, "deeptalk": chosen})
    generation = _generation(tmp_path)
    assert {key: getattr(generation, key) for key in chosen} == chosen
    assert generation.temperature == 1.0  # the other file has DeepSeek's chat settings


def test_the_default_generation_is_that_of_the_official_script(tmp_path: Path) -> None:
    generation = _generation(tmp_path)
    assert generation.speaker == "ANS_A"
    assert generation.max_turns is None
    assert not generation.fold_typed


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": "serial"},
        {"speaker": "nobody"},
        {"text_top_k": "one"},
        {"max_rows": True},
        {"max_turns": 0},
        {"fold_typed": 1},
        {"top": 1},
    ],
)
def test_invalid_generation_settings_are_refused(fields: dict[str, object], tmp_path: Path) -> None:
    _write(tmp_path, {"deeptalk": fields})
    with pytest.raises(ArtifactError, match="|".join(map(str, next(iter(fields.items()))))):
        _generation(tmp_path)
