"""Profiles that `probe` measured: one a machine, by model, memory and disk.

They lie beside the user's own profiles, in `measured/`, and the planner prefers one of this very
machine to what the profile of that name says of machines of its kind.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from deeptalk_edge.devices.identity import identify
from deeptalk_edge.devices.profile import DeviceProfile, load_profile, parse_profile, user_directory
from deeptalk_edge.errors import SettingsError


def measured_path(name: str, key: str) -> Path:
    """Where the measured profile of a machine is."""
    return user_directory() / "measured" / f"{name}-{key}.toml"


def planning_profile(name: str) -> DeviceProfile:
    """A profile for the planner: this machine's measured facts first, where there are any.

    Raises SettingsError as `load_profile` does.
    """
    profile = load_profile(name)
    measured = _of_this_machine(profile.name)
    if measured is None:
        return profile
    facts = {
        field.name: fact
        for field in dataclasses.fields(measured.facts)
        if (fact := getattr(measured.facts, field.name)) is not None
    }
    return dataclasses.replace(profile, facts=dataclasses.replace(profile.facts, **facts))


def _of_this_machine(name: str) -> DeviceProfile | None:
    path = measured_path(name, identify().key)
    try:
        return parse_profile(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError):
        return None
    except SettingsError as error:
        raise SettingsError(f"{error}; measure again with `deeptalk-edge probe`") from error
