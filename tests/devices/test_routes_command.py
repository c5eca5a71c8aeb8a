"""`deeptalk-edge routes` reports the counts of a pager."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deeptalk_edge.cli import main
from deeptalk_edge.devices.replay.simulator import ReplaySettings, replay
from deeptalk_edge.devices.replay.study import simulated_devices
from deeptalk_edge.devices.replay.synthetic import DialogueShape, synthetic_routes
from deeptalk_edge.runtime.experts.policy import Lru
from deeptalk_edge.runtime.experts.routes import Routes

SHAPE = DialogueShape(num_layers=3, num_turns=3, question_s=0.5, answer_s=2.0)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routes") / "routes.npz"
    synthetic_routes("mid", SHAPE).save(path)
    return path


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert main(["routes", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_replay_counts_what_the_simulator_counts(
    recording: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = as_json(capsys, "replay", str(recording), "--pool", "50", "--policy", "lru")["rows"]
    settings = ReplaySettings(num_slots=50, look_ahead=False)
    expected = replay(Routes.load(recording), lambda num_keys, _: Lru(num_keys), settings)
    assert [row["policy"] for row in rows] == ["lru", "lru + guesses"]
    assert rows[0]["hits"] == expected.hits.sum()
    assert rows[0]["misses"] == expected.misses.sum()
    assert rows[0]["demand_bytes"] == expected.misses.sum() * SHAPE.record_bytes
    assert rows[1]["hits"] > rows[0]["hits"]


def test_a_device_adds_simulated_times_and_the_page_cache(
    recording: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["replay", str(recording), "--pool", "42%", "100%", "--device", "orin-nano-8gb"]
    argv += ["--link", "2"]
    rows = as_json(capsys, *argv, "--profile", str(recording))["rows"]
    cached, lru = rows[0]["simulated"], rows[1]["simulated"]
    assert cached["stall_ms_per_step"] > 2 * lru["stall_ms_per_step"]
    assert rows[-1]["slots"] == 3 * 64
    assert main(["routes", *argv]) == 0
    assert "times: simulated, orin-nano-8gb" in capsys.readouterr().out


def test_routes_shows_locality(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "show", str(recording))
    assert 0.09 < found["overlap_with_previous_row"]["spoken"] < 0.6
    assert list(found["look_ahead_recall_by_layer"]) == ["2", "3"]
    assert main(["routes", "show", str(recording)]) == 0
    assert "experts touched by a prefill" in capsys.readouterr().out


def test_all_devices_are_in_one_table(recording: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["replay", str(recording), "--pool", "42%", "65%", "--policy", "lru", "--no-guesses"]
    study = as_json(capsys, *argv, "--device", "all")["devices"]
    assert list(study) == list(simulated_devices())
    nano = "orin-nano-8gb int4 3 GB/s"
    assert study[nano] == as_json(capsys, *argv, "--device", "orin-nano-8gb")["rows"]
    nvme_1 = as_json(capsys, *argv, "--device", "orin-nano-8gb", "--link", "1")["rows"]
    assert study["orin-nano-8gb int4 1 GB/s"] == nvme_1
    int8 = as_json(capsys, *argv, "--device", "rtx-4060", "--experts", "int8")["rows"]
    assert study["rtx-4060 int8 12 GB/s"] == int8
    assert main(["routes", *argv, "--device", "all"]) == 0
    table = capsys.readouterr().out.splitlines()[2:]
    assert table[0].split() == ["device", "pool", "page", "cache", "lru"]
    assert len(table) == 1 + 2 * len(study)
    cached, lru = (row["simulated"] for row in study[nano][:2])
    (line,) = (line for line in table if line.startswith(f"{nano} ") and " 81 " in line)
    shown = [f"{each['step_ms']:.1f}" for each in (cached, lru)]
    assert [word for word in line.split() if "." in word] == shown
    assert [line.split()[5] for line in table[1:] if line.startswith("rtx")] == ["-"] * 4


def test_devices_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routes", "replay", "none", "--device", "list"]) == 0
    assert "rtx-4060 int4 12 GB/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["nowhere.npz"], "nowhere.npz: no such file"),
        (["synthetic:odd"], "expected synthetic:PRESET, one of flat, mid, local"),
        (["synthetic:mid:soft"], "the wall 'soft' is no number"),
        (["{}", "--pool", "1"], "pool '1': expected 2 to 192 experts"),
        (["{}", "--pool", "all"], "pool 'all': expected a number of experts or a share"),
        (["{}", "--policy", "fifo"], "policy 'fifo': expected one of lru, decayed, phased"),
        (["{}", "--device", "abacus"], "device 'abacus': neither a profile"),
        (["{}", "--device", "thor"], "device thor has no [paging] estimates; those that do: "),
        (["{}", "--device", "rtx-4060", "--experts", "bf16"], "no [paging] estimates for experts"),
        (["{}", "--device", "rtx-4060", "--link", "-1"], "--link -1.0: expected GB per second"),
        (["{}", "--link", "1"], "--experts and --link choose among a device's estimates"),
    ],
)
def test_what_cannot_be_replayed_is_refused_in_a_line(
    recording: Path, capsys: pytest.CaptureFixture[str], argv: list[str], complaint: str
) -> None:
    filled = [word.format(recording) for word in argv]
    assert main(["routes", "replay", *filled]) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
