"""The sweep's mutations of a bundle.

field     a field of manifest.json or native.json is set to another value, or removed
file      a file is flipped, cut, emptied, removed, exchanged with another, or becomes a link, a
          directory, a pipe or a device
resealed  the same, with hashes and checksum as if the exporter had written it so
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deeptalk_edge.bundle.manifest import MANIFEST, NATIVE_INDEX, checksum_of

VALUES: dict[str, Any] = {
    "0": 0,
    "1": 1,
    "-1": -1,
    "10^12": 10**12,
    "x": "x",
    "null": None,
    "[]": [],
    "{}": {},
    "nested": "@nested@",
    "long": "n" * 300,
}
_NESTED = "[" * 200_000 + "]" * 200_000
_SAMPLED = 2  # number of a list's entries to change
_REMOVED = object()

Change = Callable[[Path], object]
Keys = tuple[Any, ...]
"""Keys and indices that lead to a field."""


@dataclass(frozen=True)
class Mutation:
    """A change of a bundle's directory, in place."""

    name: str
    apply: Change


def damaged_fields(bundle: Path) -> Iterator[Mutation]:
    """Change fields of manifest.json and keep its checksum."""
    yield from _fields(bundle, MANIFEST, _write)


def resealed_fields(bundle: Path) -> Iterator[Mutation]:
    """Change fields of manifest.json and native.json, with new hashes and checksum."""
    yield from _fields(bundle, MANIFEST, _write_sealed)
    if (bundle / NATIVE_INDEX).exists():
        yield from _fields(bundle, NATIVE_INDEX, _write_index)


def damaged_files(bundle: Path) -> Iterator[Mutation]:
    """Damage every file and keep hashes and checksum."""
    names = sorted(path.name for path in bundle.iterdir())
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        changes: dict[str, Change] = {
            "removed": Path.unlink,
            "exchanged": partial(_exchange, other=other),
            "a link": _link,
            "a link to nothing": lambda path: _become(path, lambda p: p.symlink_to("/nowhere")),
            "a device": lambda path: _become(path, lambda p: p.symlink_to("/dev/zero")),
            "a directory": lambda path: _become(path, Path.mkdir),
            "a pipe": lambda path: _become(path, os.mkfifo),
        }
        for what, change in (_CONTENTS | changes).items():
            yield Mutation(f"{name} {what}", _of_file(name, change))


def resealed_files(bundle: Path) -> Iterator[Mutation]:
    """Damage every file that the manifest hashes, with new hashes."""
    for name in sorted(path.name for path in bundle.iterdir() if path.name != MANIFEST):
        for what, change in _CONTENTS.items():
            yield Mutation(f"{name} {what}", _of_file(name, change, reseal=True))


def damaged_json(directory: Path, file: str) -> Iterator[Mutation]:
    """Damage a file without a hash."""
    yield from _fields(directory, file, partial(_write, name=file))


def _fields(bundle: Path, file: str, write: Callable[[Path, Any], None]) -> Iterator[Mutation]:
    content = json.loads((bundle / file).read_text())
    for path in _paths(content):
        spelled = f"{file}: " + ".".join(map(str, path))
        for name, value in VALUES.items():
            if _get(content, path) != value:
                yield Mutation(f"{spelled} = {name}", _of_field(content, path, value, write))
        yield Mutation(f"{spelled} removed", _of_field(content, path, _REMOVED, write))
    yield Mutation(f"{file}: a new field", _of_field(content, ("surprise",), 1, write))


def _paths(content: Any, path: Keys = ()) -> Iterator[Keys]:
    if path:
        yield path
    if isinstance(content, dict):
        for key in content:
            yield from _paths(content[key], (*path, key))
    elif isinstance(content, list):
        for index in range(min(len(content), _SAMPLED)):
            yield from _paths(content[index], (*path, index))


def _get(content: Any, path: Keys) -> Any:
    for key in path:
        content = content[key]
    return content


def _of_field(content: Any, path: Keys, value: Any, write: Callable[[Path, Any], None]) -> Change:
    def apply(place: Path) -> None:
        changed = copy.deepcopy(content)
        owner = _get(changed, path[:-1])
        if value is _REMOVED:
            del owner[path[-1]]
        else:
            owner[path[-1]] = value
        write(place, changed)

    return apply


def _write(place: Path, content: Any, name: str = MANIFEST) -> None:
    text = json.dumps(content).replace('"@nested@"', _NESTED)
    _become(place / name, lambda path: path.write_text(text))


def _write_sealed(place: Path, content: Any) -> None:
    kept = {name: content[name] for name in content.keys() - {"format", "checksum"}}
    _write(place, content | {"checksum": checksum_of(kept)} if "checksum" in content else content)


def _write_index(place: Path, content: Any) -> None:
    _write(place, content, NATIVE_INDEX)
    _reseal(place, NATIVE_INDEX)


def _reseal(place: Path, name: str) -> None:
    found = (place / name).read_bytes()
    content = json.loads((place / MANIFEST).read_text())
    sha256 = hashlib.sha256(found).hexdigest()
    content["files"][name] = {"bytes": len(found), "sha256": sha256}
    _write_sealed(place, content)


def _of_file(name: str, change: Change, *, reseal: bool = False) -> Change:
    def apply(place: Path) -> None:
        path = place / name
        whole = path.read_bytes()  # the sweep's files are hard links: never write into them
        _become(path, lambda p: p.write_bytes(whole))
        change(path)
        if reseal:
            _reseal(place, name)

    return apply


def _become(path: Path, make: Change) -> None:
    path.unlink()
    make(path)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _exchange(path: Path, other: str) -> None:
    kept, beside = path.read_bytes(), path.with_name(other)
    path.write_bytes(beside.read_bytes())
    _become(beside, lambda p: p.write_bytes(kept))


def _link(path: Path) -> None:
    elsewhere = path.with_name(f"{path.name}.elsewhere")
    shutil.copy(path, elsewhere)
    _become(path, lambda p: p.symlink_to(elsewhere))


_CONTENTS: dict[str, Change] = {
    "flipped": _flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "garbage": lambda path: path.write_bytes(b"\x93" * path.stat().st_size),
}
