"""What a machine says of itself: a value, or none and the reason. A missing reading is never 0."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

Value = TypeVar("Value", covariant=True)
Other = TypeVar("Other")

_COMMAND_S = 5.0


@dataclass(frozen=True, slots=True)
class Reading(Generic[Value]):
    """One fact of this machine."""

    value: Value | None
    why: str | None = None
    """Why there is no value."""

    def then(self, parse: Callable[[Any], Other | None], what: str) -> Reading[Other]:
        """What a parser makes of it; a ValueError or None of the parser is a missing reading."""
        if self.value is None:
            return Reading(None, self.why)
        try:
            found = parse(self.value)
        except (ValueError, OverflowError) as error:
            return Reading(None, f"{what}: not understood ({error})"[:200])
        return Reading(found, None if found is not None else f"{what}: not understood")


def read_file(path: Path, limit: int = 1 << 20) -> Reading[str]:
    """A small file of the kernel's; bytes that are no text become U+FFFD, NULs are left out."""
    try:
        with path.open("rb") as file:
            text = file.read(limit).decode("utf-8", "replace").replace("\0", "").strip()
    except OSError as error:
        return Reading(None, f"{path}: {(error.strerror or str(error)).lower()}")
    return Reading(text) if text else Reading(None, f"{path}: empty")


def first_of(readings: list[Reading[Other]], otherwise: str) -> Reading[Other]:
    """The first that has a value; else the reason of the last."""
    for reading in readings:
        if reading.value is not None:
            return reading
    return readings[-1] if readings else Reading(None, otherwise)


def run_command(*argv: str) -> Reading[str]:
    """What a program of the system prints; missing, failing or slow is a missing reading."""
    try:
        done = subprocess.run(
            argv, capture_output=True, timeout=_COMMAND_S, check=False, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        return Reading(None, f"{argv[0]}: not installed")
    except (OSError, subprocess.TimeoutExpired) as error:
        return Reading(None, f"{argv[0]}: {error}"[:200])
    text = done.stdout.decode("utf-8", "replace").strip()
    if done.returncode or not text:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return Reading(None, f"{argv[0]}: exit code {done.returncode} {' '.join(said[-1:])}"[:200])
    return Reading(text)


def first_line(*argv: str, within_s: float = _COMMAND_S) -> Reading[str]:
    """The first line of a program that prints one after the other until it is ended."""
    try:
        program = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except FileNotFoundError:
        return Reading(None, f"{argv[0]}: not installed")
    except OSError as error:
        return Reading(None, f"{argv[0]}: {error}"[:200])
    killer = threading.Timer(within_s, program.kill)
    killer.start()
    try:
        assert program.stdout is not None
        line = program.stdout.readline(1 << 16).decode("utf-8", "replace").strip()
    finally:
        killer.cancel()
        program.kill()
        program.communicate()
    return Reading(line) if line else Reading(None, f"{argv[0]}: no line within {within_s:g} s")


def integer(text: str) -> int:
    """A whole number of at most 18 digits. Raises ValueError for anything else."""
    if not (text.lstrip("-").isascii() and text.lstrip("-").isdigit() and len(text) < 19):
        raise ValueError(f"{text[:40]!r} is no whole number")
    return int(text)


def as_json(readings: Mapping[str, Reading[Any]]) -> dict[str, Any]:
    """Values by name, None where there is none, and `missing` with every reason."""
    values: dict[str, Any] = {name: reading.value for name, reading in readings.items()}
    missing = {name: r.why for name, r in readings.items() if r.value is None}
    return values | {"missing": missing}
