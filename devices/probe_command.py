"""`deeptalk-edge probe`: which machine this is and what it does in a second.

It plays three clicks, to find them in the microphone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # loading these takes longer than `--help` may
    from deeptalk_edge.devices.probe import Probe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `probe`."""
    parser.add_argument(
        "--place",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="on the disk that experts would be paged from; needs 143 MB there for a moment",
    )
    parser.add_argument(
        "--identify-only",
        action="store_true",
        help="measure, play and write nothing",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="TOML",
        help="the measured profile (default: where `plan` finds it on this machine)",
    )
    parser.add_argument("--json", action="store_true", help="a JSON object on stdout")


def main(args: argparse.Namespace) -> int:
    """Probe; returns the exit code.

    Raises SettingsError if the profile cannot be written.
    """
    from deeptalk_edge.devices.measured import measured_path
    from deeptalk_edge.devices.probe import base_profile, measured_facts, probe
    from deeptalk_edge.devices.profile_file import write_profile
    from deeptalk_edge.errors import SettingsError

    if not args.place.is_dir():
        raise SettingsError(f"--place {args.place}: not a directory")
    found = probe(args.place, measures=not args.identify_only)
    written: Path | None = None
    if not args.identify_only:
        base = base_profile(found.machine)
        written = args.output or measured_path(base.name, found.machine.key)
        head = f"Measured by `deeptalk-edge probe` on {found.machine.processor}."
        write_profile(base, measured_facts(found, base), written, head)
    content = found.as_json() | {"profile": str(written) if written else None}
    print(json.dumps(content, indent=2) if args.json else _page(found, content))
    return 0


def _page(found: Probe, content: dict[str, Any]) -> str:
    machine = found.machine
    lines = [
        f"machine       {machine.model.value or machine.processor} ({machine.kind}), "
        f"{machine.processor}, {machine.num_cores} cores",
        f"gpu           {machine.gpu.value or f'none: {machine.gpu.why}'}",
        f"disk          {machine.storage.value or machine.storage.why}",
        f"profile       {machine.profile}",
    ]
    for title, readings in (("says", found.readings), ("measured", found.measured)):
        if readings:
            lines += ["", title]
        for name, reading in readings.items():
            shown = f"- {reading.why}" if reading.value is None else _shown(reading.value)
            lines.append(f"  {name:36}{shown}")
    if content["profile"]:
        lines += ["", f"written to {content['profile']}; `plan --device {machine.profile}` uses it"]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items())
    if isinstance(value, tuple):
        return ", ".join(_shown(part) for part in value[:8])
    return str(value)
