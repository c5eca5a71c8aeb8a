"""The GPU and the software that its engines need: driver, CUDA, TensorRT, JetPack, our plugin."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator

from deeptalk_edge.devices import nvml
from deeptalk_edge.devices.checks.software import installed
from deeptalk_edge.devices.finding import Examined, Finding, Level, ok, unknown
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.errors import BackendError


def machine_found(examined: Examined) -> Iterator[Finding]:
    machine = examined.machine
    name = machine.gpu.value or machine.model.value or machine.processor
    yield ok("machine", f"{name}; profile {machine.profile}")


def gpu(examined: Examined) -> Iterator[Finding]:
    machine = examined.machine
    if machine.kind == "cpu":
        yield ok("gpu", "none: bundles for `--device cpu-int8` and `cpu` run here")
        return
    if not examined.is_live:
        yield unknown("gpu", "only the machine itself can be asked")
        return
    yield cuda()
    card = nvml.open_card()
    if card.value is None:
        level: Level = "unknown" if machine.kind == "jetson" else "warning"
        yield Finding(check="nvml", level=level, found=card.why or "", todo=nvml.EXTRA)
        return
    said = card.value.read()
    yield ok("nvml", ", ".join(f"{name} {said[name].value}" for name in ("name", "driver", "pcie")))


def cuda() -> Finding:
    """Ask CUDA for a device, as a bundle would."""
    from deeptalk_edge.runtime.cuda import Cudart

    try:
        Cudart()
    except BackendError as error:
        return Finding(
            check="cuda",
            level="error",
            found=str(error),
            todo="install the CUDA runtime that the driver supports (`nvidia-smi` names it), or "
            "use a bundle for `--device cpu-int8`",
        )
    return ok("cuda", "the CUDA runtime finds a device")


def tensorrt(examined: Examined) -> Iterator[Finding]:
    machine = examined.machine
    if machine.kind == "cpu":
        return
    facts = load_profile(machine.profile).facts
    found = {
        name: installed(name)
        for name in ("tensorrt", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-cu13")
    }
    known = {name: one for name, one in found.items() if one}
    wanted = facts.tensorrt.value if facts.tensorrt else "any"
    if not known:
        yield Finding(
            check="tensorrt",
            level="warning",
            found=f"no TensorRT can be imported; the profile expects {wanted}",
            todo="install JetPack's python3-libnvinfer, or `pip install tensorrt-rtx-cu13`",
        )
        return
    shown = ", ".join(f"{name} {one}" for name, one in known.items())
    number = re.search(r"\d+(?:\.\d+)?", wanted)
    matches = number is None or any(one.startswith(number[0]) for one in known.values())
    yield Finding(
        check="tensorrt",
        level="ok" if matches else "warning",
        found=f"{shown}; the profile expects {wanted}",
        todo=None if matches else "engines do not travel between versions: build them again here",
    )


def jetpack(examined: Examined) -> Iterator[Finding]:
    machine = examined.machine
    if machine.kind != "jetson":
        return
    if machine.l4t.value is None:
        yield unknown("jetpack", machine.l4t.why)
        return
    jetpack = jetpack_of(machine.l4t.value)
    fact = load_profile(machine.profile).facts.jetpack
    expected = fact.value if fact else None
    matches = expected is None or (jetpack or "").startswith(expected)
    yield Finding(
        check="jetpack",
        level="ok" if matches else "warning",
        found=f"L4T {machine.l4t.value}, JetPack {jetpack or 'unknown'}; profile: {expected}",
        todo=None
        if matches
        else f"bundles of profile {machine.profile} are planned for JetPack {expected}: build the "
        "engines on this board, or update it",
    )


def jetpack_of(l4t: str) -> str | None:
    """JetPack's version of an L4T release. Source: NVIDIA's JetPack archive."""
    for release, jetpack in (
        ("36.4.0", "6.1"),
        ("36.4.3", "6.2"),
        ("36.4", "6.2.1"),
        ("36.5", "6.2.2"),
        ("38.2", "7.0"),
        ("38.4", "7.1"),
        ("39.", "7.2"),
    ):
        if l4t.startswith(release):
            return jetpack
    return None


def plugin(examined: Examined) -> Iterator[Finding]:
    if examined.machine.kind == "cpu" or not examined.is_live:
        return
    place = examined.place / "libdt_moe_plugin.so"
    if not place.is_file():
        yield unknown("plugin", f"{place}: not there; --place names a bundle's folder")
        return
    try:
        ctypes.CDLL(str(place))
    except OSError as error:
        yield Finding(
            check="plugin",
            level="error",
            found=f"{place} does not load: {error}",
            todo="build it for this machine's TensorRT: `make plugin`",
        )
        return
    yield ok("plugin", f"{place} loads")
