"""The findings about this machine, each with what to do about it.

Every check reads; none changes anything, needs root, a GPU or a microphone, or talks to a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deeptalk_edge.devices.checks import clocks, gpu, software, sound, system
from deeptalk_edge.devices.finding import Check, Examined, Finding, unknown
from deeptalk_edge.devices.identity import identify
from deeptalk_edge.errors import EdgeError

CHECKS: Mapping[str, Check] = {
    "machine": gpu.machine_found,
    "gpu": gpu.gpu,
    "tensorrt": gpu.tensorrt,
    "jetpack": gpu.jetpack,
    "plugin": gpu.plugin,
    "cpu kernels": software.kernels,
    "sound": sound.sound,
    "disk": system.disk,
    "memory": system.memory,
    "huge pages": system.huge_pages,
    "limits": system.limits,
    "clocks": clocks.clocks,
    "lfb": clocks.largest_free_block,
    "container": system.container,
    "packages": software.packages,
    "telemetry": software.telemetry,
}


def examine(place: Path, root: Path = Path("/")) -> list[Finding]:
    """Run every check; one that fails by itself is a finding, not the end."""
    examined = Examined(root, place, identify(root, place))
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        try:
            findings += check(examined)
        except (OSError, ValueError, EdgeError) as error:
            findings.append(unknown(name, f"not readable: {error}"))
    return findings


def exit_code(findings: list[Finding]) -> int:
    """1 if anything is an error; warnings are 0."""
    return int(any(finding.level == "error" for finding in findings))
