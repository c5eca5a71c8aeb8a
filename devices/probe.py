"""Identifies the machine and measures it; the figures make a profile that the planner prefers."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deeptalk_edge import host
from deeptalk_edge.devices import measure, nvml, sensors
from deeptalk_edge.devices.facts import DeviceFacts, Fact
from deeptalk_edge.devices.identity import Machine, identify
from deeptalk_edge.devices.nvpmodel import active_mode
from deeptalk_edge.devices.profile import DeviceProfile, load_profile
from deeptalk_edge.devices.reading import Reading, as_json, first_line
from deeptalk_edge.devices.round_trip import sound_round_trip_ms
from deeptalk_edge.devices.tegrastats import parse_line
from deeptalk_edge.runtime.audio.pyaudio_port import PyAudioPort

SCHEMA = "deeptalk-edge.probe/1"
_COMMAND = "deeptalk-edge probe"
_RECORD_BYTES = 4_460_544  # of an int4 expert of the official size


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What was found."""

    machine: Machine
    readings: Mapping[str, Reading[Any]]
    """What the system says now."""
    measured: Mapping[str, Reading[float]]

    def as_json(self) -> dict[str, Any]:
        machine = self.machine
        identity = {
            name: value
            for field in dataclasses.fields(machine)
            if not isinstance(value := getattr(machine, name := field.name), Reading)
        }
        said = {
            field.name: value
            for field in dataclasses.fields(machine)
            if isinstance(value := getattr(machine, field.name), Reading)
        }
        return {
            "schema": SCHEMA,
            "machine": {**identity, "key": machine.key, **as_json(said)},
            "readings": as_json(self.readings),
            "measured": as_json(self.measured),
        }


def probe(place: Path, *, root: Path = Path("/"), measures: bool = True) -> Probe:
    """Identify the machine; measure it unless told not to. `place` is a folder on the disk that
    experts would be paged from."""
    machine = identify(root, place)
    return Probe(
        machine=machine,
        readings=state(root),
        measured=measurements(machine, place) if measures else {},
    )


def state(root: Path = Path("/")) -> dict[str, Reading[Any]]:
    """Power mode, clocks, heat and throttling as they are now."""
    mode = active_mode(root)
    readings: dict[str, Reading[Any]] = {
        "power_mode": mode.then(lambda found: found.name, "power mode"),
        "temperatures_c": sensors.temperatures_c(root),
        "cpu_mhz": sensors.cpu_mhz(root),
        "governor": sensors.governor(root),
        "smt": sensors.is_smt(root),
        "gpu_mhz": sensors.gpu_mhz(root),
        "emc_mhz": sensors.emc_mhz(root),
        "power_mw": sensors.ina_power_mw(root),
        "rapl_energy_j": sensors.rapl_energy_j(root),
        "throttled": sensors.throttled(root),
        "avx_mhz": Reading(None, "no file says the AVX clock; it needs the processor's MSRs"),
    }
    if root != Path("/"):
        return readings
    if Path("/etc/nv_tegra_release").exists():
        readings |= _tegra_readings(readings)
    card = nvml.open_card()
    if card.value is None:
        return readings | {"card": Reading(None, card.why)}
    return readings | {f"card_{name}": value for name, value in card.value.read().items()}


def _tegra_readings(known: Mapping[str, Reading[Any]]) -> dict[str, Reading[Any]]:
    """What only tegrastats says without root: the memory's clock, and its largest free block."""
    line = first_line("tegrastats", "--interval", "200")
    sample = parse_line(line.value or "")
    why = line.why or "tegrastats does not say it"
    emc = known["emc_mhz"]
    if emc.value is None and sample.emc_mhz is not None:
        emc = Reading(float(sample.emc_mhz))
    return {"emc_mhz": emc, "lfb_mb": Reading(sample.lfb_mb, None if sample.lfb_mb else why)}


def measurements(machine: Machine, place: Path) -> dict[str, Reading[float]]:
    """Every figure by name, units in it."""
    cores = machine.num_cores
    counts = sorted({1, 2, max(1, cores // 2), cores})
    found: dict[str, Reading[float]] = {
        f"memory_read_gb_per_s_{threads}_threads": measure.memory_read_gb_per_s(threads)
        for threads in counts
        if threads <= cores
    }
    for threads in sorted({1, cores}):
        found[f"int8_tops_{threads}_threads"] = measure.int8_tops(threads)
    found["float32_tflops"] = measure.float32_tflops()
    found["activations_g_per_s"] = measure.activations_g_per_s()
    found["float16_tflops"] = Reading(None, "no CPU kernel of ours computes in float16")
    for depth, rate in measure.disk_read_gb_per_s(place, _RECORD_BYTES).items():
        found[f"disk_read_gb_per_s_depth_{depth}"] = rate
    found |= measure.timer_us()
    found["host_link_gb_per_s"] = measure.host_link_gb_per_s()
    found["moe_kernel_gb_per_s"] = Reading(
        None, "the MoE kernel's library is built by `make plugin`; `make gpu-check` times it"
    )
    found["sound_round_trip_ms"] = sound_round_trip_ms(PyAudioPort())
    return found


def measured_facts(found: Probe, base: DeviceProfile) -> DeviceFacts:
    """What the measurements say in a profile's terms. A CPU's rates are left out for a device whose
    bundles run on its GPU."""
    measured, machine = found.measured, found.machine
    facts: dict[str, Any] = {}

    def add(name: str, value: float | None, what: str) -> None:
        if value is not None:
            day = datetime.date.today().isoformat()
            facts[name] = Fact(
                value=value, source=f"{what}, {day}", confirmed=True, measured=_COMMAND
            )

    add("memory_bytes", machine.memory_bytes.value, "what the kernel sees")
    disks = _best(measured, "disk_read_gb_per_s")
    add("disk_read_gb_per_s", disks, "records of 4.5 MB in chunks, O_DIRECT, the best depth of 4")
    add("host_link_gb_per_s", measured["host_link_gb_per_s"].value, "pinned copies of 128 MB")
    if base.has_engines:
        return DeviceFacts(**facts)
    memory = _best(measured, "memory_read_gb_per_s")
    add("memory_bandwidth_gb_per_s", memory, "our kernels' reads, the best number of threads")
    add("int8_tops", _best(measured, "int8_tops"), "our int8 kernel on 64 rows")
    add("float32_tflops", measured["float32_tflops"].value, "numpy's BLAS on 768 x 768")
    activations = measured["activations_g_per_s"].value
    add("activations_g_per_s", activations, "our codec kernels' Snake on one thread")
    add("usable_memory_bytes", host.read_memory().available_bytes, "available when it was probed")
    return DeviceFacts(**facts)


def _best(measured: Mapping[str, Reading[float]], begin: str) -> float | None:
    values = [r.value for name, r in measured.items() if name.startswith(begin)]
    known = [value for value in values if value is not None]
    return max(known) if known else None


def base_profile(machine: Machine) -> DeviceProfile:
    """The profile of such machines, which the measured one adds to."""
    return load_profile(machine.profile)
