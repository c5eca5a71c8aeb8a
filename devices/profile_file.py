"""Writes a device profile as the TOML file that `devices/profile.py` reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from deeptalk_edge.devices.facts import DeviceFacts
from deeptalk_edge.devices.profile import DeviceProfile, parse_profile
from deeptalk_edge.files import write_file


def write_profile(profile: DeviceProfile, facts: DeviceFacts, place: Path, head: str) -> None:
    """Write a profile with these facts alone, and read it back first.

    Raises SettingsError if the place cannot be written.
    """
    text = profile_text(profile, facts, head)
    parse_profile(text, str(place))
    place.parent.mkdir(parents=True, exist_ok=True)
    write_file(place, text.encode())


def profile_text(profile: DeviceProfile, facts: DeviceFacts, head: str) -> str:
    """TOML, without the tables of power modes and of paging."""
    lines = [f"# {head}"]
    for name in ("name", "summary", "backend", "moe", "expert_residency"):
        lines.append(f"{name} = {_value(getattr(profile, name))}")
    lines += ["", "[precision]"]
    for name, value in dataclasses.asdict(profile.precision).items():
        if value is not None:
            lines.append(f"{name} = {_value(value)}")
    lines += ["", "[facts]"]
    for field in dataclasses.fields(facts):
        if (fact := getattr(facts, field.name)) is not None:
            parts = [
                f"{name} = {_value(value)}"
                for name, value in dataclasses.asdict(fact).items()
                if value is not None
            ]
            lines.append(f"{field.name} = {{ {', '.join(parts)} }}")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """A basic string of TOML is one of JSON's, as far as we write them."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value)
