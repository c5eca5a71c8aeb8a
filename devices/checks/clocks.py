"""Governor, power mode, heat and throttling; a Jetson's largest free block."""

from __future__ import annotations

from collections.abc import Iterator

from deeptalk_edge.devices import sensors
from deeptalk_edge.devices.finding import Examined, Finding, ok, unknown
from deeptalk_edge.devices.nvpmodel import active_mode
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.devices.reading import first_line
from deeptalk_edge.devices.tegrastats import parse_line

_LEAST_LFB_MB = 4


def clocks(examined: Examined) -> Iterator[Finding]:
    root = examined.root
    governor = sensors.governor(root)
    if governor.value is None:
        yield unknown("governor", governor.why)
    else:
        is_fast = governor.value == "performance"
        yield Finding(
            check="governor",
            level="ok" if is_fast else "warning",
            found=governor.value,
            todo=None
            if is_fast
            else "sudo cpupower frequency-set -g performance; on a Jetson sudo jetson_clocks: an "
            "idle processor is slow when the question ends",
        )
    if examined.machine.kind == "jetson":
        yield from _power_mode(examined)
    hot = sensors.temperatures_c(root)
    if hot.value is None:
        yield unknown("heat", hot.why)
    else:
        name, hottest = max(hot.value.items(), key=lambda zone: zone[1])
        yield Finding(
            check="heat",
            level="warning" if hottest > 85 else "ok",
            found=f"{hottest:.0f} C at {name}",
            todo="cool it: the clocks fall above about 90 C" if hottest > 85 else None,
        )
    throttled = sensors.throttled(root)
    if throttled.value:
        yield Finding(
            check="throttling",
            level="warning",
            found=f"{throttled.value} times so far",
            todo="cool it, or choose a power mode that it can hold",
        )


def _power_mode(examined: Examined) -> Iterator[Finding]:
    mode = active_mode(examined.root)
    if mode.value is None:
        yield unknown("power mode", mode.why)
        return
    name = mode.value.name
    modes = {one.name: one for one in load_profile(examined.machine.profile).power_modes}
    known = modes.get(name)
    if known is not None and known.memory_bandwidth_gb_per_s is not None:
        best = load_profile(examined.machine.profile).facts.memory_bandwidth_gb_per_s
        if best and known.memory_bandwidth_gb_per_s < 0.9 * best.value:
            yield Finding(
                check="power mode",
                level="warning",
                found=f"{name}: memory at {known.memory_bandwidth_gb_per_s:g} of "
                f"{best.value:g} GB/s",
                todo="sudo nvpmodel -m N, N from `nvpmodel -p --verbose`, then read back by "
                "`nvpmodel -q`: a number that the board lacks changes nothing",
            )
            return
    yield ok("power mode", name)


def largest_free_block(examined: Examined) -> Iterator[Finding]:
    if examined.machine.kind != "jetson" or not examined.is_live:
        return
    line = first_line("tegrastats", "--interval", "200")
    sample = parse_line(line.value or "")
    if sample.lfb_mb is None:
        yield unknown("lfb", line.why or "tegrastats does not say it")
        return
    is_whole = sample.lfb_mb >= _LEAST_LFB_MB
    yield Finding(
        check="lfb",
        level="ok" if is_whole else "warning",
        found=f"largest free block {sample.lfb_mb} MB, {sample.lfb_blocks} of them",
        todo=None if is_whole else "memory is fragmented: reboot, or start this program first",
    )
