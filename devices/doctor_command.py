"""`deeptalk-edge doctor`: what is set up wrong on this machine, and what to do about it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deeptalk_edge.devices.finding import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `doctor`."""
    parser.add_argument(
        "--place",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="the folder of bundles, whose disk is checked (default: here)",
    )
    parser.add_argument("--json", action="store_true", help="a JSON object on stdout")


def main(args: argparse.Namespace) -> int:
    """Examine; returns 1 if something does not work, 0 for warnings.

    Raises SettingsError if the place is no folder.
    """
    from deeptalk_edge.devices.doctor import examine, exit_code
    from deeptalk_edge.errors import SettingsError

    if not args.place.is_dir():
        raise SettingsError(f"--place {args.place}: not a directory")
    findings = examine(args.place)
    if args.json:
        content = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"schema": "deeptalk-edge.doctor/1", "findings": content}, indent=2))
    else:
        print(page(findings))
    return exit_code(findings)


def page(findings: list[Finding]) -> str:
    """A line a finding, and below it what to do."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:9}{finding.check:14}{finding.found}")
        if finding.todo:
            lines.append(f"{'':23}-> {finding.todo}")
    counts = {level: sum(f.level == level for f in findings) for level in ("error", "warning")}
    lines.append(f"\n{counts['error']} errors, {counts['warning']} warnings")
    return "\n".join(lines)
