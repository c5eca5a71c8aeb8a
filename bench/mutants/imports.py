"""Finds which test file imports which source: it takes a second, a recording takes an hour.

A test file counts as executing every line of the sources that it imports, directly, through test
helpers, or through other sources. Of the test files that reach a source, only the nearest ones
count and those one import farther. `coverage_map` is more exact.
"""

from __future__ import annotations

import ast
from pathlib import Path

from deeptalk_edge.bench.mutants.coverage_map import TestFile, hash_of, test_files

GUESSED_S = 10.0
"""Assumed time of a test file that has not been timed."""

_LINKED_ROOMS = ("bench", "calibration", "devices", "export", "runtime", "training")
"""Folders of the checkout that deeptalk_edge/ links to."""


def importing(root: Path, seconds: dict[str, float]) -> list[TestFile]:
    """Return every test file as if it executed all that it imports; `seconds` has known times."""
    graph = _Graph(root)
    steps = {path: graph.steps(path) for path in test_files(root)}
    nearest: dict[str, int] = {}
    for each in steps.values():
        for source, count in each.items():
            nearest[source] = min(count, nearest.get(source, count))
    lines = {source: frozenset(range(1, _num_lines(root / source) + 1)) for source in nearest}
    return [
        TestFile(
            path=path,
            seconds=seconds.get(path, GUESSED_S),
            failure="",
            lines={each: lines[each] for each in near},
            hashes={each: hash_of(root / each) for each in near},
            steps=near,
        )
        for path, far in steps.items()
        for near in [{each: n for each, n in far.items() if n <= nearest[each] + 1}]
    ]


class _Graph:
    """The graph of imports, read from the sources on demand."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._imports: dict[str, set[str]] = {}

    def steps(self, test: str) -> dict[str, int]:
        """Return the sources that a test file imports, with the number of sources between."""
        found, ring = {test: 0}, {test}
        while ring:
            after = set[str]()
            for path in ring:
                # A test helper has the distance of the test itself.
                step = found[path] + (not path.startswith("tests/"))
                for each in self._imported_by(path):
                    if step < found.get(each, step + 1):
                        found[each] = step
                        after.add(each)
            ring = after
        return {path: count for path, count in found.items() if not path.startswith("tests/")}

    def _imported_by(self, path: str) -> set[str]:
        if path not in self._imports:
            places = {_place(self._root, name) for name in _imported(self._root / path)}
            self._imports[path] = {place for place in places if place is not None}
        return self._imports[path]


def _imported(path: Path) -> set[str]:
    """Return the imported dotted names, of modules or of their members."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names.update(each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{each.name}" for each in node.names)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("deeptalk_edge."):
            names.add(str(node.value))  # imported later, or run with -m
    return names


def _place(root: Path, name: str) -> str | None:
    """Return the file of one of our modules, relative to the checkout."""
    parts = name.split(".")
    if parts[0] == "deeptalk_edge" and len(parts) > 1 and parts[1] in _LINKED_ROOMS:
        parts = parts[1:]
    path = "/".join(parts) + ".py"
    return path if parts[0] != "__init__" and (root / path).is_file() else None


def _num_lines(path: Path) -> int:
    return path.read_text("utf-8").count("\n") + 1
