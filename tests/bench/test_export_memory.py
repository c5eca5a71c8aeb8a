"""`bench export_memory`, on a small model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from deeptalk_edge.bench.export_memory import main, write_random_checkpoint
from deeptalk_edge.checkpoint.reader import Checkpoint
from tests.places import TINY


def test_a_random_checkpoint_is_whole_and_has_the_layers_asked_for(tmp_path: Path) -> None:
    write_random_checkpoint(TINY, tmp_path / "checkpoint", 3)
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    assert checkpoint.spec.decoder.num_layers == 3
    assert len(list((tmp_path / "checkpoint").glob("layer-*.safetensors"))) == 3
    last = checkpoint.tensor("model.layers.2.mlp.experts.7.down_proj.weight")
    assert 0.01 < last.std() < 0.03


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_reported_by_layers_and_no_file_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--like", str(TINY), "--work", str(tmp_path), "--layers", "2", "3"]
    assert main([*flags, "--device", "agx-orin-64gb"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["settings"]["device"] == "agx-orin-64gb"
    two, three = (report["figures"]["layers"][num] for num in ("2", "3"))
    assert three["bundle_mb"] > two["bundle_mb"] > 0
    assert two["bundle_mb"] < 1.5 * two["checkpoint_mb"]  # a float32 bundle has twice as much
    assert two["anonymous_mb"] > 10
    assert list(tmp_path.iterdir()) == []


def test_one_number_of_layers_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--like", str(TINY), "--work", "nowhere", "--layers", "2"])
    assert "two numbers or more" in capsys.readouterr().err
