"""`deeptalk-edge export --dry-run` and the choice of a device, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deeptalk_edge.cli import main
from deeptalk_edge.devices.profile import profile_names
from tests.places import OFFICIAL_SIZE, ROOT

OFFICIAL = str(OFFICIAL_SIZE)


def _plan(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert main(["export", OFFICIAL, "--dry-run", *more]) == 0
    return capsys.readouterr().out


def test_a_plan_says_what_is_written_and_that_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    page = _plan(capsys, "--device", "orin-nano-8gb")
    for words in ("tensorrt for sm_87", "experts int4 g128", "7422.3 MB", "fit: yes, with "):
        assert words in page
    assert max(map(len, page.splitlines())) <= 160


def test_a_plan_that_does_not_fit_says_by_how_much(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    board = tmp_path / "board.toml"
    text = (ROOT / "devices" / "profiles" / "orin-nano-8gb.toml").read_text(encoding="utf-8")
    board.write_text(text.replace("5_583_457_485", "3_000_000_000"), encoding="utf-8")
    needed = json.loads(_plan(capsys, "--device", str(board), "--json"))["memory"]["needed_bytes"]
    page = _plan(capsys, "--device", str(board))
    assert f"fit: NO, {(needed - 3e9) / 1e6:.1f} MB short" in page


def test_a_plan_in_json_has_everything_that_the_page_shows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = json.loads(_plan(capsys, "--device", "rtx-4060", "--json"))
    assert plan["total_bytes"] == sum(file["bytes"] for file in plan["files"])
    assert plan["memory"]["fits"] is True
    assert plan["memory"]["usable"]["confirmed"] is False
    assert plan["precision"]["experts"] == "int4 g128"
    assert plan["build_minutes"]["basis"]


def test_a_time_that_was_not_measured_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(_plan(capsys, "--device", "thor", "--json"))
    assert plan["build_minutes"]["value"] is None
    assert "minutes not known" in _plan(capsys, "--device", "thor")


def test_a_chosen_backend_and_precision_replace_those_of_the_device(
    capsys: pytest.CaptureFixture[str],
) -> None:
    as_ort = json.loads(_plan(capsys, "--device", "thor", "--backend", "ort", "--json"))
    assert (as_ort["backend"], as_ort["precision"]["experts"]) == ("ort", "float32")
    as_int8 = json.loads(_plan(capsys, "--device", "thor", "--precision", "experts=int8", "--json"))
    assert as_int8["precision"]["experts"] == "int8"
    assert as_int8["total_bytes"] < as_ort["total_bytes"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "name the bundle's place with -o"),
        (["--dry-run", "--device", "tx2"], "device 'tx2': neither a profile"),
        (["--dry-run", "--backend", "tensorrt"], "needs a GPU"),
        (["--dry-run", "--precision", "experts=int8"], "float32 throughout"),
        (["--dry-run", "--snac", "nowhere"], "nowhere/config.json: no such file"),
        (["--dry-run", "--encoder", "nowhere"], "holds no config.json"),
    ],
)
def test_a_wrong_choice_is_one_line_and_exit_code_1(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", OFFICIAL, *flags]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_devices_are_listed_without_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--list-devices"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == profile_names()
