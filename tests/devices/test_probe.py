"""A probe gives a value or a reason for each reading, and a profile that the planner prefers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.cli import main
from deeptalk_edge.devices import measure
from deeptalk_edge.devices.facts import Fact
from deeptalk_edge.devices.measured import measured_path, planning_profile
from deeptalk_edge.devices.probe import measured_facts, measurements, probe, state
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.devices.profile_file import profile_text, write_profile
from deeptalk_edge.devices.reading import Reading, first_line, read_file, run_command
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.audio.virtual_port import EchoPath, VirtualPort, recording
from tests.devices.trees import ORIN_NANO, plant


def test_a_machine_without_any_readings_can_be_probed(tmp_path: Path) -> None:
    found = probe(tmp_path, root=tmp_path, measures=False)
    content = found.as_json()
    readings = content["readings"]
    missing = readings.pop("missing")
    assert set(readings.values()) == {None}
    assert readings.keys() == missing.keys()
    assert all(missing.values())
    assert content["machine"]["memory_bytes"] is None
    assert "meminfo: no such file" in content["machine"]["missing"]["memory_bytes"]
    json.dumps(content)


def test_a_board_is_probed_from_its_files(tmp_path: Path) -> None:
    readings = state(plant(tmp_path, ORIN_NANO))
    assert readings["power_mode"].value == "15W"
    assert readings["governor"].value == "schedutil"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Use smaller measurements than a real probe, and a temporary user's directory."""
    monkeypatch.setattr(measure, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(measure, "_TURNS", 1)
    monkeypatch.setattr("deeptalk_edge.devices.probe._RECORD_BYTES", 1 << 16)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def room() -> VirtualPort:
        return VirtualPort(recording(np.zeros(0, np.float32)), echo=EchoPath(gain=0.3))

    monkeypatch.setattr("deeptalk_edge.devices.probe.PyAudioPort", room)
    return tmp_path


def test_the_planner_uses_the_rates_that_were_measured_here(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", "--place", str(quick), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    profile = content["machine"]["profile"]
    assert content["profile"] == str(measured_path(profile, content["machine"]["key"]))
    planned = planning_profile(profile)
    fact = planned.facts.memory_bytes
    assert fact
    assert fact.confirmed
    assert fact.measured == "deeptalk-edge probe"
    assert fact.value == content["machine"]["memory_bytes"]
    assert load_profile(profile).facts.memory_bytes != fact  # the shipped profile does not change


def test_only_identifying_writes_nothing(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--identify-only", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["profile"] is None
    assert content["measured"] == {"missing": {}}
    assert not (quick / "config").exists()


def test_a_place_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--place", "nowhere"]) == 1
    assert "nowhere: not a directory" in capsys.readouterr().err


def test_every_measurement_has_a_value_or_a_reason(quick: Path) -> None:
    found = probe(quick, measures=False)
    for name, reading in measurements(found.machine, quick).items():
        assert (reading.value is None) is (reading.why is not None), name
        assert reading.value is None or reading.value > 0, name
        assert name != "sound_round_trip_ms" or reading.value


def test_cpu_rates_are_not_used_for_a_board_with_a_gpu(quick: Path) -> None:
    found = probe(quick)
    cpu = measured_facts(found, load_profile("cpu-int8"))
    assert cpu.int8_tops
    assert cpu.activations_g_per_s
    facts = measured_facts(found, load_profile("orin-nano-8gb"))
    assert (facts.int8_tops, facts.memory_bandwidth_gb_per_s) == (None, None)
    assert facts.memory_bytes


def test_a_written_profile_is_read_back_and_a_damaged_one_gives_a_warning(quick: Path) -> None:
    base = load_profile("orin-nano-8gb")
    fact: Fact[int] = Fact(value=8, source='a "quoted" page', confirmed=False)
    facts = replace(base.facts, memory_bytes=fact)
    write_profile(base, facts, quick / "deep" / "board.toml", "a head")
    again = load_profile(str(quick / "deep" / "board.toml"))
    assert again.facts == facts
    assert profile_text(base, facts, "a head").startswith("# a head\n")


def test_a_damaged_measured_profile_is_refused_with_the_way_out(quick: Path) -> None:
    found = probe(quick, measures=False)
    path = measured_path(found.machine.profile, found.machine.key)
    path.parent.mkdir(parents=True)
    path.write_text("name = 3")
    with pytest.raises(SettingsError, match="measure again"):
        planning_profile(found.machine.profile)


def test_records_are_read_in_the_pagers_chunks_into_whole_records(tmp_path: Path) -> None:
    record_bytes, num_records = (1 << 20) + 8192, 3
    path = tmp_path / "records"
    path.write_bytes(bytes(record_bytes * num_records))
    reads = measure.DiskReads(path, record_bytes)
    asked: list[tuple[int, int, int]] = []
    read = reads._read

    def watched(chunk: tuple[int, int, int]) -> None:
        asked.append(chunk)
        read(chunk)

    reads._read = watched  # type: ignore[method-assign]
    assert reads.gb_per_s(2, 20) > 0
    reads.close()
    timed = asked[2:]  # the first two start the threads
    assert sorted(size for _, _, size in timed) == [8192] * 20 + [1 << 20] * 20
    assert all(offset % record_bytes in (0, 1 << 20) for _, offset, _ in timed)
    assert {place // record_bytes for place, _, _ in timed} == set(range(16))


def test_a_file_that_ends_within_a_record_has_no_rate(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(bytes(4 * 4096))
    reads = measure.DiskReads(path, 4096)
    path.write_bytes(b"")
    with pytest.raises(OSError, match="short"):
        reads.gb_per_s(1, 4)
    reads.close()


def test_a_disk_that_cannot_be_written_has_no_rate() -> None:
    rates = measure.disk_read_gb_per_s(Path("/proc"), 4096, depths=(1,))
    assert rates[1].value is None
    assert rates[1].why


def test_the_first_line_of_an_endless_program_is_used_and_a_silent_one_times_out() -> None:
    assert first_line("sh", "-c", "while :; do echo RAM 1/2MB; done").value == "RAM 1/2MB"
    silent = first_line("sleep", "60", within_s=0.05)
    assert silent.why == "sleep: no line within 0.05 s"
    assert first_line("no-such-program").why == "no-such-program: not installed"


def test_a_command_that_is_missing_or_fails_is_a_missing_reading(tmp_path: Path) -> None:
    assert run_command("no-such-program").why == "no-such-program: not installed"
    assert "exit code 3" in (run_command("sh", "-c", "echo no >&2; exit 3").why or "")
    assert read_file(tmp_path).value is None
    assert Reading("x").then(int, "a number").why == (
        "a number: not understood (invalid literal for int() with base 10: 'x')"
    )
