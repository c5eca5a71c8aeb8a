"""`bench full_size`, on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deeptalk_edge.bench.full_size import main
from tests.places import TINY


@pytest.mark.slow
def test_every_combination_is_run_and_no_file_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = str(sorted((TINY / "questions").glob("*.wav"))[0])
    sizes = ["--like", str(TINY), "--tokenizer", str(TINY / "tokenizer.json"), "--precision"]
    sizes += ["experts=int8"]
    asked = ["--wav", question, "--threads", "1", "--pool", "100%", "70%", "--rows", "12"]
    asked += ["--pause", "0"]
    assert main([*sizes, *asked, "--work", str(tmp_path / "work")]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = report["figures"]["rows"]
    assert [(row["pool"], row["window"]) for row in rows] == [
        ("100%", "whole"),
        ("100%", "near"),
        ("70%", "whole"),
        ("70%", "near"),
    ]
    for row in rows:
        assert 0 < row["encoder_ms"] + row["prefill_ms"] < row["first_sample_ms"]
        assert row["prompt_rows"] > 100  # two seconds and more of speech
    assert list(tmp_path.iterdir()) == []
