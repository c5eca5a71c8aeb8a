"""`deeptalk-edge plan`: a table, a page, a picture, and one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deeptalk_edge.cli import main
from tests.places import OFFICIAL_SIZE

OFFICIAL = str(OFFICIAL_SIZE)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def test_json_has_what_the_page_shows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    argv = ["plan", "--device", "thor", "rtx-4060", "--checkpoint", OFFICIAL]
    assert main([*argv, "--json", "--svg", str(tmp_path / "plan.svg")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["source"] == "computed"
    thor, card = content["plans"]
    assert (thor["verdict"], card["verdict"]) == ("fits", "pages")
    assert card["memory"]["resident_share"] == pytest.approx(0.486, abs=0.01)
    assert (tmp_path / "plan.svg").read_text().startswith("<svg")
    assert main(argv) == 0
    table = capsys.readouterr().out
    assert f"{thor['expected']['voice_to_voice_ms']:.0f}" in table


def test_a_bundle_is_planned_in_its_own_precision(
    bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["plan", "--device", "laptop-8gb", "--bundle", str(bundle_path), "--json"]
    assert main(argv) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["backend"] == "ort"
    assert plan["precision"]["experts"] == "float32"


def test_a_shorter_question_and_hangover_are_answered_sooner(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def wait_ms(*flags: str) -> float:
        argv = ["plan", "--device", "thor", "--checkpoint", OFFICIAL, "--json", *flags]
        assert main(argv) == 0
        (plan,) = json.loads(capsys.readouterr().out)["plans"]
        return float(plan["expected"]["voice_to_voice_ms"])

    asked = wait_ms()
    assert wait_ms("--hangover", "100") == pytest.approx(asked - 200)
    assert wait_ms("--question", "10", "--encoder-window", "near") < asked
    assert wait_ms("--items", "1") < asked
    assert wait_ms("--precision", "decoder=int8") < asked


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--device", "tx2", "--checkpoint", OFFICIAL], "device 'tx2': neither a profile"),
        (["--device", "thor", "--checkpoint", "none"], "none/config.json: no such file"),
        (["--device", "thor", "--bundle", "none"], "none/manifest.json: no such file"),
        (["--device", "thor", "--checkpoint", OFFICIAL, "--question", "0"], "--question 0.0"),
        (["--device", "thor", "--checkpoint", OFFICIAL, "--context", "-1"], "--context -1"),
        (["--device", "thor", "--checkpoint", OFFICIAL, "--power-mode", "7W"], "no power mode"),
        (["--device", "thor", "--checkpoint", OFFICIAL, "--svg", "/x/y"], "/x/y"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *argv]) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
