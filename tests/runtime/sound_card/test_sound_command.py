"""`deeptalk-edge sound` on the private card."""

from __future__ import annotations

import json
import sys

import pytest

from deeptalk_edge.cli import main
from tests.runtime.sound_card.conftest import Card
from tests.runtime.sound_card.trials import on_a_steady_machine
from tests.runtime.sound_card.warbles import warble


def test_the_list_names_every_device_and_marks_the_defaults(
    card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sound"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["name", "in", "out", "rate_hz", "default"]
    assert {row.split()[1] for row in rows[1:]} >= {"vmic", "vspk", "vmon", "default"}
    assert [row for row in rows if row.endswith("input, output")] == [
        row for row in rows if " default " in row and "rate_hz" not in row
    ]
    assert main(["sound", "--json"]) == 0
    devices = json.loads(capsys.readouterr().out)["audio"]
    assert {"index", "name", "num_inputs", "num_outputs", "rate_hz"} <= devices[0].keys()


@on_a_steady_machine
def test_the_meter_shows_the_level(card: Card, capsys: pytest.CaptureFixture[str]) -> None:
    card.say(warble(2.0, 16000))
    command = ["sound", "--meter", "1.5", "--input-device", "vmic"]
    assert main(command) == 0
    (last,) = capsys.readouterr().err.splitlines()  # no bar: stderr is no terminal
    assert last.startswith("peak -")
    assert -20 < float(last.split("peak ")[1].split()[0]) <= 0


def test_a_meter_for_a_microphone_that_is_not_there_says_so(
    card: Card, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sound", "--meter", "1", "--input-device", "nobody"]) == 1
    assert "'nobody' is not there; there are: 'vmic'" in capsys.readouterr().err
    assert main(["sound", "--meter", "-1"]) == 1
    assert "--meter -1.0: expected more than 0" in capsys.readouterr().err


def test_without_pyaudio_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyaudio", None)
    assert main(["sound"]) == 1
    assert "deeptalk-edge[sound]" in capsys.readouterr().err
