"""Which test file imports which source: known in a second, where a recording takes an hour.

A test file counts as executing every line of what it imports, itself, through the helpers of the
tests, or through other sources; but of the test files only those count that are nearest to a
source, or one import farther. `coverage_map` knows better.
"""

from __future__ import annotations

import ast
from pathlib import Path

from deeptalk_edge.bench.mutants.coverage_map import TestFile, hash_of, test_files

GUESSED_S = 10.0
"""Of a test file that nobody has timed."""

_LINKED_ROOMS = ("bench", "calibration", "devices", "export", "runtime", "training")
"""In deeptalk_edge/ they are links to folders of the checkout."""


def importing(root: Path, seconds: dict[str, float]) -> list[TestFile]:
    """Every test file, as if it executed whatever it imports; `seconds` are known of some."""
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
    """Who imports whom, read from the sources as far as they are asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._imports: dict[str, set[str]] = {}

    def steps(self, test: str) -> dict[str, int]:
        """The sources that a test file imports, by how many other sources lie between."""
        found, ring = {test: 0}, {test}
        while ring:
            after = set[str]()
            for path in ring:
                # A helper of the tests is as near as the test itself.
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
    """Dotted names, a module's or of something in it."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names.update(each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{each.name}" for each in node.names)
        elif isinstance(node, ast.Constant) and str(node.value).startswith("deeptalk_edge."):
            names.add(str(node.value))  # imported late, or run with -m
    return names


def _place(root: Path, name: str) -> str | None:
    """The file of a module of ours, relative to the checkout."""
    parts = name.split(".")
    if parts[0] == "deeptalk_edge" and len(parts) > 1 and parts[1] in _LINKED_ROOMS:
        parts = parts[1:]
    path = "/".join(parts) + ".py"
    return path if parts[0] != "__init__" and (root / path).is_file() else None


def _num_lines(path: Path) -> int:
    return path.read_text("utf-8").count("\n") + 1
