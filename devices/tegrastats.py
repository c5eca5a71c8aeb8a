"""One line of NVIDIA's `tegrastats` on a Jetson, whatever the L4T release.

The fields' spelling changes between releases, so each is looked for by itself, what is not there is
None, and unknown fields are ignored. Power is in milliwatts, now and on average; `lfb` is the
largest free block of memory: fragmentation fails an allocation long before RAM is full.

Source: docs.nvidia.com/jetson, tegrastats utility.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_NUMBER = r"(\d{1,9}(?:\.\d{1,6})?)"
_TOTAL_RAILS = ("VDD_IN", "VIN", "POM_5V_IN")
"""Rails that carry all of a module's power; a board without one has the sum of its rails."""
_INPUT_RAILS = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
"""AGX Orin has no total: these three add up to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TegraSample:
    """None where the line does not say."""

    ram_used_mb: int | None = None
    ram_total_mb: int | None = None
    lfb_mb: int | None = None
    """Size of one of the largest free blocks."""
    lfb_blocks: int | None = None
    swap_used_mb: int | None = None
    cpu_percent: tuple[float | None, ...] = ()
    """By core; None: powered down."""
    cpu_mhz: tuple[int | None, ...] = ()
    emc_percent: float | None = None
    emc_mhz: int | None = None
    gpu_percent: float | None = None
    gpu_mhz: tuple[int, ...] = ()
    """By graphics cluster: three on Thor."""
    temperatures_c: Mapping[str, float] = field(default_factory=dict)
    power_mw: Mapping[str, int] = field(default_factory=dict)
    """By rail, at this moment."""

    @property
    def total_mw(self) -> int | None:
        """Of the module; None if no rail says it."""
        for rail in _TOTAL_RAILS:
            if rail in self.power_mw:
                return self.power_mw[rail]
        rails = [self.power_mw[rail] for rail in _INPUT_RAILS if rail in self.power_mw]
        return sum(rails) if len(rails) == len(_INPUT_RAILS) else None


def parse_line(line: str) -> TegraSample:
    """Never raises: what cannot be read is None."""
    line = line[:10_000]
    ram = re.search(r"\bRAM (\d{1,9})/(\d{1,9})MB(?: \(lfb (\d{1,9})x(\d{1,9})(MB|kB))?", line)
    swap = re.search(r"\bSWAP (\d{1,9})/\d{1,9}MB", line)
    emc = re.search(rf"\bEMC_FREQ {_NUMBER}%(?:@(\d{{1,9}}))?", line)
    gpu = re.search(rf"\bGR3D_FREQ (?:{_NUMBER}%)?(?:@\[?([\d,]{{1,60}})\]?)?", line)
    percents, clocks = _cores(line)
    return TegraSample(
        ram_used_mb=_int(ram, 1),
        ram_total_mb=_int(ram, 2),
        lfb_blocks=_int(ram, 3),
        lfb_mb=_int(ram, 4) if ram and ram[5] == "MB" else 0 if ram and ram[5] == "kB" else None,
        swap_used_mb=_int(swap, 1),
        cpu_percent=percents,
        cpu_mhz=clocks,
        emc_percent=_float(emc, 1),
        emc_mhz=_int(emc, 2),
        gpu_percent=_float(gpu, 1),
        gpu_mhz=tuple(int(item) for item in gpu[2].split(",") if item) if gpu and gpu[2] else (),
        temperatures_c=_temperatures(line),
        power_mw=_rails(line),
    )


def _cores(line: str) -> tuple[tuple[float | None, ...], tuple[int | None, ...]]:
    found = re.search(r"\bCPU \[([^\]]{0,2000})\]", line)
    percents: list[float | None] = []
    clocks: list[int | None] = []
    for core in found[1].split(",") if found else ():
        one = re.fullmatch(rf"\s*{_NUMBER}%(?:@(\d{{1,9}}))?\s*", core)
        percents.append(_float(one, 1))
        clocks.append(_int(one, 2))
    return tuple(percents), tuple(clocks)


def _temperatures(line: str) -> dict[str, float]:
    """A sensor that is off says -256 C: it is left out."""
    found = re.findall(r"\b([A-Za-z][\w-]{0,30})@(-?\d{1,4}(?:\.\d{1,6})?)C\b", line)
    return {name: float(value) for name, value in found if float(value) > -100}


def _rails(line: str) -> dict[str, int]:
    """`VDD_IN 4567mW/4567mW`; JetPack 4 has no unit."""
    found = re.findall(
        r"\b((?:VDD|VIN|POM|NC)[\w]{0,40}) (\d{1,9})(?:mW)?/\d{1,9}(?:mW)?(?![\w.])", line
    )
    return {name: int(value) for name, value in found}


def _int(found: re.Match[str] | None, group: int) -> int | None:
    return int(found[group]) if found and found[group] is not None else None


def _float(found: re.Match[str] | None, group: int) -> float | None:
    return float(found[group]) if found and found[group] is not None else None
