"""Draws the faults from a seed, with a share for every room of the sources.

A room's share grows with the square root of its lines: the runtime has forty times the lines of the
calibration and gets six times its faults. Within a room the operators alternate, because constants
would outnumber all others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deeptalk_edge.bench.mutants.cpp_faults import cpp_faults
from deeptalk_edge.bench.mutants.fault import Fault
from deeptalk_edge.bench.mutants.python_faults import python_faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Source files of one kind; globs are relative to the checkout."""

    name: str
    globs: tuple[str, ...]
    left_out: tuple[str, ...] = ()


_SHARED = ("", "bundle/", "checkpoint/", "model/", "sound/")

# Left out: the programs that check kernels, files that only Arm compiles, and the plugin's
# emulation of a card, which belongs to the tests.
ROOMS = (
    Room(name="runtime", globs=("runtime/**/*.py",)),
    Room(
        name="shared",
        globs=tuple(f"deeptalk_edge/{folder}*.py" for folder in _SHARED),
    ),
    Room(name="export", globs=("export/**/*.py",)),
    Room(name="calibration", globs=("calibration/**/*.py",)),
    Room(name="training", globs=("training/**/*.py",)),
    Room(
        name="native/cpu",
        globs=("native/cpu/*.cpp", "native/cpu/*.h"),
        left_out=("check", "isa_neon", "path_neon"),
    ),
    Room(
        name="native/tensorrt_plugin",
        globs=("native/tensorrt_plugin/moe_kernels.cuh", "native/tensorrt_plugin/moe_launch.cu"),
    ),
)


def schedule(root: Path, seed: int, count: int, rooms: tuple[Room, ...] = ROOMS) -> list[str]:
    """Return the names of the rooms of `count` faults, shuffled."""
    lines = [sum(text.count("\n") for text in _texts(root, room).values()) for room in rooms]
    names = [
        room.name
        for room, share in zip(rooms, shares(lines, count), strict=True)
        for _ in range(share)
    ]
    random.Random(seed).shuffle(names)
    return names


def draws(root: Path, seed: int, rooms: tuple[Room, ...] = ROOMS) -> dict[str, Iterator[Fault]]:
    """Return each room's faults in random order, on distinct lines, with alternating operators."""
    return {
        room.name: _draw(_texts(root, room), random.Random(f"{seed} {room.name}")) for room in rooms
    }


def shares(lines: list[int], count: int) -> list[int]:
    """Return the number of faults of each room, of `count`, given its lines of source."""
    roots = [math.sqrt(each) for each in lines]
    total = sum(roots) or 1.0
    ends = [round(count * sum(roots[: i + 1]) / total) for i in range(len(roots))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def _texts(root: Path, room: Room) -> dict[str, str]:
    paths = {path for pattern in room.globs for path in root.glob(pattern)}
    return {
        str(path.relative_to(root)): path.read_text("utf-8")
        for path in sorted(paths)
        if not path.name.startswith(room.left_out or ("\0",))
    }


def _draw(texts: dict[str, str], chance: random.Random) -> Iterator[Fault]:
    by_operator: dict[str, list[Fault]] = {}
    for path, text in texts.items():
        find = python_faults if path.endswith(".py") else cpp_faults
        for fault in find(path, text):
            by_operator.setdefault(fault.operator, []).append(fault)
    queues = [by_operator[name] for name in sorted(by_operator)]
    for queue in queues:
        chance.shuffle(queue)
    taken: set[tuple[str, int]] = set()
    while queues:
        chance.shuffle(queues)
        for queue in queues:
            fault = queue.pop()
            if (fault.path, fault.line) not in taken:
                taken.add((fault.path, fault.line))
                yield fault
        queues = [queue for queue in queues if queue]
