"""Power modes of a Jetson. Modes go by name: their numbers differ between boards, and `nvpmodel -m`
with a number that a board lacks keeps the old mode without a word. So what is set is read back.

Source: the header of NVIDIA's nvpmodel configuration files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from deeptalk_edge.devices.reading import Reading, first_of, read_file, run_command
from deeptalk_edge.errors import SettingsError


@dataclass(frozen=True, slots=True)
class ActiveMode:
    """The mode that a board is in."""

    name: str
    id: int | None


def parse_query(text: str) -> ActiveMode | None:
    """Of `nvpmodel -q`: a line `NV Power Mode: MAXN`, and its number on a separate line."""
    name = re.search(r"^NV Power Mode: *(\S{1,60})[ \t]*$", text, re.MULTILINE)
    number = re.search(r"^ *(\d{1,3}) *$", text, re.MULTILINE)
    return ActiveMode(name[1], int(number[1]) if number else None) if name else None


def parse_modes(text: str) -> dict[int, str]:
    """Names by number, of nvpmodel.conf."""
    found = re.findall(r"^\s*<\s*POWER_MODEL\s+ID=(\d{1,3})\s+NAME=(\S{1,60})\s*>", text, re.M)
    return {int(number): name for number, name in found}


def parse_status(text: str, modes: dict[int, str]) -> ActiveMode | None:
    """Of /var/lib/nvpmodel/status: `pmode:0002`; its name by the configuration."""
    found = re.search(r"\bpmode:(\d{1,6})", text)
    if not found or int(found[1]) not in modes:
        return None
    return ActiveMode(modes[int(found[1])], int(found[1]))


def set_mode(name: str) -> None:
    """Choose a mode by its name, and read it back. Needs root.

    Raises SettingsError if the board has no such mode, or is in another one afterwards.
    """
    modes = parse_modes(read_file(Path("/etc/nvpmodel.conf")).value or "")
    numbers = [number for number, known in modes.items() if known == name]
    if not numbers:
        known = ", ".join(modes.values()) or "none: no /etc/nvpmodel.conf"
        raise SettingsError(f"power mode {name!r}: this board has {known}")
    done = run_command("nvpmodel", "-m", str(numbers[0]))
    now = active_mode()
    if now.value is None or now.value.name != name:
        found = now.value.name if now.value else now.why
        raise SettingsError(
            f"power mode {name}: was set, but the board is in {found} ({done.why or done.value}); "
            "run as root, or reboot if nvpmodel says so"
        )


def active_mode(root: Path = Path("/")) -> Reading[ActiveMode]:
    """The mode the board is in: nvpmodel says it, else its files, which need no root."""
    conf = read_file(root / "etc/nvpmodel.conf")
    modes = parse_modes(conf.value or "")
    by_file = read_file(root / "var/lib/nvpmodel/status").then(
        lambda text: parse_status(text, modes), "nvpmodel's status"
    )
    if root != Path("/"):
        return by_file if conf.value else Reading(None, conf.why)
    asked = run_command("nvpmodel", "-q").then(parse_query, "nvpmodel -q")
    return first_of([asked, by_file], "no nvpmodel")
