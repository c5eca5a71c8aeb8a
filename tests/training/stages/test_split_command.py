"""`train split` on a toy: the JSON that a stage reads, the table, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deeptalk_edge.cli import main
from deeptalk_edge.training.expert_split import load_split
from deeptalk_edge.training.stages.table import check_split
from tests.training.toys import SPEC, write_toy_checkpoint, write_toy_data


@pytest.mark.parametrize(("count", "by"), [("adaptive", "hits"), ("2", "mass")])
def test_a_split_is_written_with_its_table_and_its_page(
    count: str, by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_toy_checkpoint(tmp_path / "checkpoint")
    data = write_toy_data(tmp_path / "data", 4)
    out, page = tmp_path / "split.json", tmp_path / "split.html"
    words = [f"AQACONVA={data}", f"TQA={data}", "--count", count, "--by", by]
    assert (
        main(["train", "split", str(checkpoint), *words, "-o", str(out), "--page", str(page)]) == 0
    )
    split = load_split(out)
    check_split(split, SPEC.decoder)
    assert json.loads(out.read_text()) == split
    if count == "2":
        assert [len(layer) for layer in split] == [2, 2]
    assert "load audio" in capsys.readouterr().out
    assert "Audio experts" in page.read_text()


def test_a_count_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_toy_checkpoint(tmp_path / "checkpoint")
    data = write_toy_data(tmp_path / "data", 2)
    words = ["train", "split", str(checkpoint), f"AQACONVA={data}", f"TQA={data}"]
    assert main([*words, "--count", "4", "-o", str(tmp_path / "split.json")]) == 1
    assert "both kinds need at least top_k = 2" in capsys.readouterr().err
    assert not (tmp_path / "split.json").exists()
