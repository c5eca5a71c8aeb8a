"""Any content of a checkpoint's config files gives a plan or one refusal that names the file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deeptalk_edge.cli import main
from tests.bundle.mutations import damaged_json
from tests.places import TINY

FILES = (
    "config.json",
    "audio_encoder/config.json",
    "snac/config.json",
    "generation_config.json",
)


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.slow, id="whole")])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_config_is_planned_with_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, step: int
) -> None:
    outcomes = set()
    for mutation in list(damaged_json(TINY, file))[::step]:
        place = tmp_path / "checkpoint"
        shutil.rmtree(place, ignore_errors=True)
        for name in (*FILES, "tokenizer.json"):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(TINY / name, place / name)
        mutation.apply(place)
        code = main(["export", str(place), "--dry-run"])
        message = capsys.readouterr().err
        assert code in (0, 1), mutation.name
        assert "Traceback" not in message, mutation.name
        if code:
            assert message.count("\n") == 1, mutation.name
        outcomes.add(code)
    assert 1 in outcomes
