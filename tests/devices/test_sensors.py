"""Sensors are read from the kernel; a missing reading has a reason."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeptalk_edge.devices import sensors
from deeptalk_edge.devices.reading import integer
from tests.devices.trees import ORIN_NANO, PC, THOR, plant

READERS = [
    sensors.temperatures_c,
    sensors.cpu_mhz,
    sensors.governor,
    sensors.is_smt,
    sensors.gpu_mhz,
    sensors.emc_mhz,
    sensors.ina_power_mw,
    sensors.throttled,
    sensors.rapl_energy_j,
    sensors.rapl_wrap_j,
]


def test_an_orin_reports_temperatures_clocks_and_power(tmp_path: Path) -> None:
    root = plant(tmp_path, ORIN_NANO)
    assert sensors.temperatures_c(root).value == {"cpu-thermal": 47.5}  # the other is off
    assert sensors.cpu_mhz(root).value == (1510.4,)
    assert sensors.gpu_mhz(root).value == {"17000000.gpu": 306}
    assert sensors.ina_power_mw(root).value == {"VDD_IN": 5500, "VDD_SOC": 1500}


def test_the_clusters_of_a_thor_are_read(tmp_path: Path) -> None:
    assert sensors.gpu_mhz(plant(tmp_path, THOR)).value == {"gpu-gpc-0": 1575, "gpu-nvd-0": 1692}


def test_a_pc_counts_joules_and_throttling(tmp_path: Path) -> None:
    root = plant(tmp_path, PC)
    assert sensors.rapl_energy_j(root).value == 262143
    assert sensors.rapl_wrap_j(root).value == pytest.approx(262143.33)
    assert sensors.is_smt(root).value is True
    assert sensors.throttled(root).value == 3


@pytest.mark.parametrize("read", READERS)
def test_a_machine_without_sensors_has_reasons_and_no_zeros(read, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    reading = read(tmp_path)
    assert reading.value is None
    assert reading.why


@given(content=st.binary(max_size=60), name=st.sampled_from(sorted(ORIN_NANO | PC)))
def test_damaged_files_raise_no_error(
    content: bytes, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = plant(tmp_path_factory.mktemp("tree"), {name: "x"})
    (root / name).write_bytes(content)
    for read in READERS:
        reading = read(root)
        assert (reading.value is None) is (reading.why is not None)


@given(st.text(max_size=30))
def test_only_whole_numbers_are_whole_numbers(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert str(integer(text)).lstrip("-") in text
