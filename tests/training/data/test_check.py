"""`train check` names every problem with file and line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from deeptalk_edge.cli import main
from deeptalk_edge.errors import ArtifactError, SettingsError
from deeptalk_edge.training.data.check import check_data, sources_of
from tests.training.toys import CODEBOOK, write_toy_checkpoint, write_toy_data


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "checkpoint")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_toy_data(tmp_path / "data", count=2)


def _append(data: Path, user: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    turns = [{"role": "user", **user}, {"role": "assistant", **answer}]
    with data.open("a") as file:
        file.write(json.dumps({"conversations": turns}) + "\n")


GOOD_USER = {"content": "where is gate one", "wavpath": "q0.wav"}
GOOD_ANSWER = {"content": "left", "codec": [1] * 14}


@pytest.mark.parametrize(
    ("user", "answer", "said"),
    [
        ({"wavpath": "gone.wav"}, {}, r"gone\.wav: no such recording"),
        ({"wavpath": "data.jsonl"}, {}, r"data\.jsonl: not a WAV file"),
        ({"wavpath": {"wavpath": "q0.wav", "start": 9, "end": 8}}, {}, "samples 9 to 8 of"),
        ({}, {"codec": [1] * 13}, "13 codes are no whole number of frames of 7"),
        ({}, {"codec": [1] * 13 + [CODEBOOK]}, f"code {CODEBOOK} is outside 0 to {CODEBOOK - 1}"),
        ({}, {"codec": "gone.snac"}, r"codes .*gone\.snac"),
        ({}, {"wavpath": "q0.wav", "codec": [1] * 70}, "10 codec frames for a recording of"),
        ({}, {"content": "left right " * 6}, "ids and its speech only 10 rows"),
        ({}, {"content": " "}, "the answer has no text"),
        ({}, {"speaker": "NOBODY"}, "NOBODY.*this checkpoint has"),
        ({"role": "observer"}, {}, "role is 'observer'"),
        ({}, {"codec": None}, "needs an answer with codec or wavpath"),
    ],
)
def test_a_problem_is_named_with_file_and_line(
    checkpoint: Path, data: Path, user: dict[str, Any], answer: dict[str, Any], said: str
) -> None:
    _append(data, {**GOOD_USER, **user}, {**GOOD_ANSWER, **answer})
    num_good, (problem,) = check_data(checkpoint, [f"AQACONVA={data}"], max_rows=1000)
    assert num_good == 2
    assert problem.where == f"{data}:3"
    import re

    assert re.search(said, problem.what), problem.what


def test_a_line_that_is_not_json_is_named(checkpoint: Path, data: Path) -> None:
    data.write_text(data.read_text() + '{"conversations"\n\n')
    num_good, (problem,) = check_data(checkpoint, [str(data)], max_rows=1000)
    assert (num_good, problem.where) == (2, f"{data}:3")


def test_a_sample_that_is_too_long_is_named(checkpoint: Path, data: Path) -> None:
    num_good, problems = check_data(checkpoint, [str(data)], max_rows=10)
    assert num_good == 0
    assert all("max_rows is 10" in problem.what for problem in problems)


def test_official_tsv_lists_are_read_as_conversations(checkpoint: Path, data: Path) -> None:
    place = data.parent
    (place / "codes.snac").write_text(" ".join(["3"] * 14))
    (place / "audio_in.tsv").write_text(".\nq0.wav\t9\nq1.wav\t9\t0\t800\n")
    (place / "text_in.wrd").write_text("gate one\ngate two\n")
    (place / "text_out.wrd").write_text("left\nright\n")
    (place / "codec_out.tsv").write_text(".\ncodes.snac\t2\ncodes.snac\t2\n")
    assert check_data(checkpoint, [f"AQACONVA={place}"], max_rows=1000) == (2, ())
    assert check_data(checkpoint, [f"ASRRAW={place}"], max_rows=1000) == (2, ())
    (place / "text_out.wrd").write_text("left\n")
    with pytest.raises(ArtifactError, match="not equally long"):
        check_data(checkpoint, [f"AQACONVA={place}"], max_rows=1000)


@pytest.mark.parametrize(
    "task",
    ["ASRRAW", "AQA", "AQAA", "AQACONV", "AQACONVA", "RQACONV", "RQACONVA", "TTS", "TQA", "TQAA"],
)
def test_every_task_reads_the_same_conversations(checkpoint: Path, data: Path, task: str) -> None:
    assert check_data(checkpoint, [f"{task}={data}"], max_rows=1000) == (2, ())


def test_json_is_a_list_of_conversations(checkpoint: Path, data: Path) -> None:
    items = [json.loads(line)["conversations"] for line in data.read_text().splitlines()]
    path = data.with_suffix(".json")
    path.write_text(json.dumps(items))
    assert check_data(checkpoint, [str(path)], max_rows=1000) == (2, ())
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="expected a JSON list"):
        check_data(checkpoint, [str(path)], max_rows=1000)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(SettingsError, match="SING is no task"):
        sources_of(["SING=data.jsonl"])


def test_the_command_prints_problems_and_fails(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _append(data, {**GOOD_USER, "wavpath": "gone.wav"}, GOOD_ANSWER)
    words = ["train", "check", f"AQACONVA={data}", "--checkpoint", str(checkpoint)]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert f"{data}:3: " in out
    assert "2 samples are good, 1 are bad" in out
