"""Each finding says what to do; a machine without readings is examined, too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deeptalk_edge.cli import main
from deeptalk_edge.devices import doctor
from deeptalk_edge.devices.checks.gpu import jetpack_of
from deeptalk_edge.devices.doctor import examine, exit_code
from deeptalk_edge.devices.finding import Finding
from tests.devices.trees import ORIN_NANO, PC, plant


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def test_this_machine_is_examined(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = main(["doctor", "--place", str(tmp_path), "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert code == any(finding["level"] == "error" for finding in findings)
    named = {finding["check"]: finding for finding in findings}
    assert named["packages"]["level"] == "ok"
    assert named["telemetry"]["level"] == "ok"
    for finding in findings:
        assert finding["level"] in ("ok", "unknown") or finding["todo"], finding
    assert main(["doctor", "--place", str(tmp_path)]) == code
    assert "warnings" in capsys.readouterr().out.splitlines()[-1]


def test_a_slow_power_mode_gets_advice(tmp_path: Path) -> None:
    found = by_check(examine(tmp_path, plant(tmp_path / "root", ORIN_NANO)))
    assert found["power mode"].level == "warning"
    assert "15W: memory at 68 of 102 GB/s" in found["power mode"].found
    assert "read back" in (found["power mode"].todo or "")
    assert found["governor"].level == "warning"
    assert found["jetpack"].level == "warning"  # 6.2, and the profile is for 7.2
    assert found["heat"].found == "48 C at cpu-thermal"


def test_a_machine_without_a_readable_file_has_findings_and_no_error(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    findings = examine(tmp_path, root)
    assert exit_code(findings) == 0
    found = by_check(findings)
    for check in ("governor", "heat", "huge pages", "memory"):
        assert found[check].level == "unknown"
        assert found[check].found


def test_throttling_swap_and_a_container_give_warnings(tmp_path: Path) -> None:
    swapping = {"proc/meminfo": PC["proc/meminfo"] + "SwapTotal: 4000000 kB\nSwapFree: 1000 kB\n"}
    files = (
        PC
        | swapping
        | {".dockerenv": "", "sys/kernel/mm/transparent_hugepage/enabled": "a [never]"}
    )
    found = by_check(examine(tmp_path, plant(tmp_path / "root", files)))
    for check in ("throttling", "swap", "container", "huge pages"):
        assert found[check].level == "warning", check
        assert found[check].todo


def test_a_check_that_fails_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(examined: object) -> list[Finding]:
        raise OSError("a file bites")

    monkeypatch.setattr(doctor, "CHECKS", {"broken": broken})
    (finding,) = examine(tmp_path, tmp_path)
    assert (finding.level, finding.found) == ("unknown", "not readable: a file bites")


def test_an_error_is_exit_code_1() -> None:
    warning = Finding(check="a", level="warning", found="b", todo="c")
    assert exit_code([warning]) == 0
    assert exit_code([warning, Finding(check="a", level="error", found="b", todo="c")]) == 1


@pytest.mark.parametrize(
    ("l4t", "jetpack"), [("36.4.3", "6.2"), ("36.4.7", "6.2.1"), ("39.2.0", "7.2"), ("99", None)]
)
def test_jetpack_is_derived_from_the_release(l4t: str, jetpack: str | None) -> None:
    assert jetpack_of(l4t) == jetpack
