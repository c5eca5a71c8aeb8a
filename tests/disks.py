"""Disks that are full, read-only or small, and device nodes, for tests of writing."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """Mount a disk of `size` at `place`; skips the test if mounting is refused."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let us mount a small disk")
    try:
        yield place
    finally:
        # Lazily: a test that fails may have left a file open.
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def make_read_only(disk: Path) -> None:
    """Make a mounted disk read-only, also for root."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def device_node(place: Path, minor: int) -> Path:
    """Make a node like /dev/null (3), /dev/zero (5) or /dev/full (7), so that no test risks the
    real one; skips the test if that is refused."""
    try:
        make_node(place, minor)
    except OSError:
        pytest.skip("this machine does not let us make a device node")
    return place


def make_node(place: Path, minor: int) -> None:
    """Make such a node; raises OSError if it is refused."""
    os.mknod(place, stat.S_IFCHR | 0o666, os.makedev(1, minor))
    place.open("wb").close()
