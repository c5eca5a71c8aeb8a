"""Power is sampled during a run from the machine's sensors, at almost no cost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deeptalk_edge.devices.monitor import Monitor, power_source
from tests.devices.trees import ORIN_NANO, PC, THOR, plant


@pytest.mark.parametrize(
    ("files", "method", "watts"),
    [
        (ORIN_NANO, "INA3221, rail VDD_IN, all of the module", 5.5),
        (THOR, "INA3221, rail VIN, all of the module", 38),
    ],
)
def test_a_jetsons_total_rail_is_its_power(
    files: dict[str, str], method: str, watts: float, tmp_path: Path
) -> None:
    source = power_source(plant(tmp_path, files)).value
    assert source
    assert source.method == method
    assert source.read() == watts


def test_a_pcs_counter_is_read_as_joules(tmp_path: Path) -> None:
    source = power_source(plant(tmp_path, PC)).value
    assert source
    assert source.is_counter
    assert source.read() == 262143


def test_a_machine_without_power_sensors_gives_the_reason(tmp_path: Path) -> None:
    with Monitor(tmp_path, hz=50) as monitor:
        time.sleep(0.05)
    assert monitor.method is None
    assert "no INA3221" in (monitor.why_no_power or "")
    assert monitor.samples() == []
    assert monitor.energy_j(0, 1) is None
    assert monitor.hottest_c is None


def test_a_turn_reports_its_energy_and_the_cost_of_sampling(tmp_path: Path) -> None:
    root = plant(tmp_path, ORIN_NANO)
    with Monitor(root) as monitor:
        time.sleep(0.45)
        start_s = time.monotonic() - 0.4
        end_s = start_s + 0.3
    assert monitor.energy_j(start_s, end_s) == pytest.approx(0.3 * 5.5)
    assert monitor.hottest_c == 47.5
    assert monitor.overhead_share is not None
    assert 0 < monitor.overhead_share < 1  # 0.004 on a quiet machine; a busy one says more


def test_a_failed_sampler_raises_when_its_context_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = Monitor(plant(tmp_path, ORIN_NANO))

    def broken() -> None:
        raise RuntimeError("a sensor bites")

    monkeypatch.setattr(monitor, "_sample", broken)
    with pytest.raises(RuntimeError, match="bites"), monitor:
        pass
