"""What the kernel's files say of heat, clocks and power, on any Linux; nothing here needs root, and
what a system hides is a missing reading with its reason.

Source: the kernel's documentation of thermal, cpufreq, devfreq, hwmon and powercap.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from deeptalk_edge.devices.reading import Reading, first_of, integer, read_file

_MAX_TEMPERATURE_C = 200


def temperatures_c(root: Path = Path("/")) -> Reading[dict[str, float]]:
    """By thermal zone; zones that are off, or say what cannot be, are left out."""
    found = {
        name: value
        for name, place in temperature_files(root).items()
        if (value := temperature_c(place)) is not None
    }
    if found:
        return Reading(found)
    return Reading(None, f"{root / 'sys/class/thermal'}: no zone with a temperature")


def temperature_files(root: Path = Path("/")) -> dict[str, Path]:
    """Where each zone's temperature is: found once, read often."""
    zones = _sorted(root / "sys/class/thermal", "thermal_zone*")
    return {read_file(zone / "type").value or zone.name: zone / "temp" for zone in zones}


def temperature_c(place: Path) -> float | None:
    """Of one zone; None if it is off."""
    value = read_file(place).then(integer, "temperature").value
    return value / 1000 if value is not None and -50 < value / 1000 < _MAX_TEMPERATURE_C else None


def cpu_mhz(root: Path = Path("/")) -> Reading[tuple[float, ...]]:
    """The clock of each core now."""
    cores = _cores(root)
    values = [
        read_file(core / "cpufreq/scaling_cur_freq").then(integer, "clock").value for core in cores
    ]
    known = tuple(value / 1000 for value in values if value is not None)
    if known:
        return Reading(known)
    text = read_file(root / "proc/cpuinfo").value or ""
    said = tuple(float(mhz) for mhz in re.findall(r"^cpu MHz\s*: (\d{1,6}\.\d+)", text, re.M))
    return Reading(said) if said else Reading(None, "no cpufreq, and /proc/cpuinfo has no clock")


def governor(root: Path = Path("/")) -> Reading[str]:
    """What sets the clock of the first core."""
    return read_file(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def is_smt(root: Path = Path("/")) -> Reading[bool]:
    """Two threads share a core."""
    return read_file(root / "sys/devices/system/cpu/smt/active").then(
        lambda text: {"0": False, "1": True}.get(text), "smt"
    )


def gpu_mhz(root: Path = Path("/")) -> Reading[dict[str, float]]:
    """Of a Jetson's graphics clusters, by devfreq."""
    found = {}
    for place in _sorted(root / "sys/class/devfreq", "*"):
        if re.search(r"gpu|ga10b|gv11b|nvd", place.name):
            value = read_file(place / "cur_freq").then(integer, "clock").value
            if value is not None:
                found[place.name] = value / 1e6
    return Reading(found) if found else Reading(None, "no GPU under /sys/class/devfreq")


def emc_mhz(root: Path = Path("/")) -> Reading[float]:
    """The memory's clock on a Jetson; only root may read it on most releases."""
    places = ("sys/kernel/debug/bpmp/debug/clk/emc/rate", "sys/kernel/actmon_avg_activity/emc_rate")
    readings = [read_file(root / place).then(integer, "EMC clock") for place in places]
    return first_of(readings, "no EMC").then(lambda rate: rate / 1e6, "EMC clock")


def ina_power_mw(root: Path = Path("/")) -> Reading[dict[str, float]]:
    """By rail: volts times amperes of INA3221 sensors, on a Jetson."""
    found = {
        name: value
        for name, rail in ina_rails(root).items()
        if (value := rail_mw(rail)) is not None
    }
    return Reading(found) if found else Reading(None, "no INA3221 under /sys/class/hwmon")


Rail = tuple[Path, Path]
"""Where its millivolts and its milliamperes are."""


def ina_rails(root: Path = Path("/")) -> dict[str, Rail]:
    """By rail: found once, read often."""
    found: dict[str, Rail] = {}
    for chip in _sorted(root / "sys/class/hwmon", "hwmon*"):
        if not (read_file(chip / "name").value or "").startswith("ina3221"):
            continue
        for label in _sorted(chip, "in*_label"):
            number = re.sub(r"\D", "", label.name)
            if name := read_file(label).value:
                found[name] = chip / f"in{number}_input", chip / f"curr{number}_input"
    return found


def rail_mw(rail: Rail) -> float | None:
    """Of one rail, now."""
    volts, amperes = (read_file(place).then(integer, "a rail").value for place in rail)
    return None if volts is None or amperes is None else volts * amperes / 1000


def throttled(root: Path = Path("/")) -> Reading[int]:
    """How often the processor was slowed down for its heat since it started, or a rail's alarm."""
    counts = [
        read_file(core / "thermal_throttle/core_throttle_count").then(integer, "count").value
        for core in _cores(root)
    ]
    known = [count for count in counts if count is not None]
    if known:
        return Reading(sum(known))
    alarms = [
        read_file(alarm).then(integer, "alarm").value
        for chip in _sorted(root / "sys/class/hwmon", "hwmon*")
        for alarm in _sorted(chip, "curr*_alarm")
    ]
    raised = [alarm for alarm in alarms if alarm is not None]
    return Reading(sum(raised)) if raised else Reading(None, "no throttle counter, no rail's alarm")


def rapl_energy_j(root: Path = Path("/")) -> Reading[float]:
    """Joules of all processor packages since some moment; wraps, see `rapl_wrap_j`."""
    zones = _sorted(root / "sys/class/powercap", "intel-rapl:?")
    readings = [read_file(zone / "energy_uj").then(integer, "energy") for zone in zones]
    values = [reading.value for reading in readings if reading.value is not None]
    if values and len(values) == len(zones):
        return Reading(sum(values) / 1e6)
    why = readings[0].why if readings else "no RAPL under /sys/class/powercap"
    return Reading(None, why)


def rapl_wrap_j(root: Path = Path("/")) -> Reading[float]:
    """At which the counter begins again."""
    zones = _sorted(root / "sys/class/powercap", "intel-rapl:?")
    values = [
        read_file(zone / "max_energy_range_uj").then(integer, "range").value for zone in zones
    ]
    known = [value for value in values if value is not None]
    return Reading(sum(known) / 1e6) if known else Reading(None, "no range of RAPL")


def _cores(root: Path) -> list[Path]:
    return _sorted(root / "sys/devices/system/cpu", "cpu[0-9]*")


def _sorted(folder: Path, pattern: str) -> list[Path]:
    def found() -> Iterator[Path]:
        try:
            yield from folder.glob(pattern)
        except OSError:
            return

    return sorted(found())
