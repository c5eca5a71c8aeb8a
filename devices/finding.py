"""What a check of `doctor` finds, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deeptalk_edge.devices.identity import Machine

Level = Literal["ok", "warning", "error", "unknown"]
"""As it should be; works, slower or later than it could; something that was requested does not
work; could not be read, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    found: str
    todo: str | None = None
    """What to do; None where there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Examined:
    """The machine whose files lie below `root`, and a folder of its disk."""

    root: Path
    place: Path
    machine: Machine

    @property
    def is_live(self) -> bool:
        """Its programs and devices may be asked, too."""
        return self.root == Path("/")


Check = Callable[[Examined], Iterator[Finding]]


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check=check, level="ok", found=found)


def unknown(check: str, why: str | None) -> Finding:
    """Nothing could be read."""
    return Finding(check=check, level="unknown", found=why or "not readable")
