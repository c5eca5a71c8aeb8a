"""Lines of tegrastats of any release are read as far as possible, without errors."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeptalk_edge.devices.tegrastats import TegraSample, parse_line

# As boards of these releases print them; the figures are made up.
R32_NANO = (
    "RAM 2465/3956MB (lfb 6x4MB) SWAP 0/1978MB (cached 0MB) IRAM 0/252kB(lfb 252kB) "
    "CPU [23%@1479,off,10%@1479,12%@1479] EMC_FREQ 0% GR3D_FREQ 15% PLL@35C CPU@38.5C "
    "PMIC@100C GPU@37C AO@43C thermal@37.75C POM_5V_IN 2983/2983 POM_5V_GPU 0/0 POM_5V_CPU 498/498"
)
R35_AGX = (
    "RAM 25686/30536MB (lfb 1234x4MB) SWAP 0/15268MB (cached 0MB) CPU [15%@2265,10%@2265] "
    "EMC_FREQ 3%@3199 GR3D_FREQ 99%@[1300,1290] VIC_FREQ 115 APE 174 CV0@-256C CPU@45.5C "
    "Tboard@40C GPU@48.0C VDD_GPU_SOC 15000mW/14000mW VDD_CPU_CV 3500mW/3400mW "
    "VIN_SYS_5V0 4500mW/4400mW NC 0mW/0mW VDDQ_VDD2_1V8AO 600mW/600mW"
)
R36_NANO = (
    "04-17-2026 10:15:23 RAM 4521/7620MB (lfb 2x4MB) SWAP 12/3810MB (cached 0MB) "
    "CPU [3%@1510,2%@1510,1%@1510,0%@1510,0%@1510,0%@1510] EMC_FREQ 5%@3199 GR3D_FREQ 37%@[1020] "
    "cpu@47.5C soc2@48C soc0@48.9C gpu@46.4C tj@49.3C soc1@47.5C VDD_IN 4567mW/4500mW "
    "VDD_CPU_GPU_CV 989mW/989mW VDD_SOC 1234mW/1234mW"
)
R38_THOR = (
    "08-25-2025 12:00:00 RAM 9876/125772MB (lfb 44x4MB) SWAP 0/0MB (cached 0MB) "
    "CPU [1%@2601,0%@2601] EMC_FREQ 1%@4266 GR3D_FREQ @[1575,1575,1560] NVENC0_FREQ @1692 "
    "tj@51.2C cpu@49.0C VDD_GPU 6000mW/6000mW VDD_CPU_SOC_MSS 9000mW/9000mW "
    "VIN_SYS_5V0 4000mW/4000mW VIN 38000mW/37000mW"
)


@pytest.mark.parametrize(
    ("line", "lfb_mb", "emc_mhz", "gpu_percent", "gpu_mhz", "hottest_c", "total_mw"),
    [
        (R32_NANO, 4, None, 15, (), 100, 2983),
        (R35_AGX, 4, 3199, 99, (1300, 1290), 48, 23000),
        (R36_NANO, 4, 3199, 37, (1020,), 49.3, 4567),
        (R38_THOR, 4, 4266, None, (1575, 1575, 1560), 51.2, 38000),
    ],
    ids=["L4T 32", "L4T 35", "L4T 36", "L4T 38"],
)
def test_the_lines_of_several_releases_are_understood(
    line: str,
    lfb_mb: int,
    emc_mhz: int | None,
    gpu_percent: float | None,
    gpu_mhz: tuple[int, ...],
    hottest_c: float,
    total_mw: int,
) -> None:
    sample = parse_line(line)
    assert (sample.lfb_mb, sample.emc_mhz, sample.gpu_percent) == (lfb_mb, emc_mhz, gpu_percent)
    assert sample.gpu_mhz == gpu_mhz
    assert max(sample.temperatures_c.values()) == hottest_c
    assert sample.total_mw == total_mw
    assert sample.ram_used_mb is not None


def test_a_core_that_is_off_has_no_load_and_a_sensor_that_is_off_no_heat() -> None:
    assert parse_line(R32_NANO).cpu_percent == (23, None, 10, 12)
    assert "CV0" not in parse_line(R35_AGX).temperatures_c


def test_a_value_that_a_line_lacks_is_none_and_not_zero() -> None:
    sample = parse_line("a line of another program")
    assert sample == TegraSample()
    assert sample.total_mw is None


@given(
    line=st.sampled_from([R32_NANO, R35_AGX, R36_NANO, R38_THOR]),
    end=st.integers(0, 500),
    noise=st.text(max_size=30),
)
def test_a_cut_or_damaged_line_raises_no_error_and_adds_no_value(
    line: str, end: int, noise: str
) -> None:
    whole, cut = parse_line(line), parse_line(line[:end] + noise)
    if not noise:  # a number may be cut in two, a field may be missing; no other may appear
        assert cut.temperatures_c.keys() <= whole.temperatures_c.keys()
        assert cut.power_mw.keys() <= whole.power_mw.keys()


@given(st.text(max_size=300))
def test_garbage_is_a_sample_of_plain_numbers(text: str) -> None:
    sample = parse_line(text)
    for field in fields(sample):
        value = getattr(sample, field.name)
        assert value is None or isinstance(value, (int, float, tuple, dict))
