"""Records which test file executes which source line: each test file runs once under `coverage`.

A run takes about as long as the test suite. The result, one JSON file per test file, is valid until
the test file changes; a source file that has changed since counts as wholly executed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deeptalk_edge.bench.mutants.tree import TreeCopy
from deeptalk_edge.bench.mutants.warm import WarmPython
from deeptalk_edge.errors import EdgeError

SKIPPED = (
    "tests/runtime/sound_card",
    "tests/runtime/loop/test_card.py",
    "tests/bench/mutants",
)
"""Test files to skip: they need a sound server, or test this tool."""

LIMIT_S = 1800.0

_SETTINGS = """
[run]
data_file = {folder}/data
parallel = true
patch = _exit
include = {root}/*
omit = {root}/tests/*
"""

# It runs in each Python process of a test and reads COVERAGE_PROCESS_START.
_SITE = "import coverage; coverage.process_startup()\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class TestFile:
    """The lines that one run of a test file executed."""

    __test__ = False  # not a test itself

    path: str
    seconds: float
    failure: str
    """Failure without any fault, which excludes the test file. Empty if it passed."""

    lines: dict[str, frozenset[int]]
    """Executed lines by source file, relative to the checkout."""

    hashes: dict[str, str]
    """Hashes of those source files when they were recorded."""

    steps: dict[str, int] = field(default_factory=dict)
    """Import distance of those source files, if only that is known; see imports.py."""


class CoverageError(EdgeError):
    """The map of executed lines cannot be recorded."""


def test_files(root: Path) -> list[str]:
    """List the test files, relative and sorted, without the skipped ones."""
    found = (str(path.relative_to(root)) for path in sorted(root.glob("tests/**/test_*.py")))
    return [path for path in found if not path.startswith(SKIPPED)]


def covering(tests: Iterable[TestFile], root: Path, path: str, line: int) -> list[TestFile]:
    """Return the passing test files that execute `line` of `path`, the fastest first."""
    digest = hash_of(root / path)
    found = [
        test
        for test in tests
        if not test.failure
        and path in test.lines
        and (line in test.lines[path] or test.hashes.get(path) != digest)
    ]
    return sorted(found, key=lambda test: test.seconds)


def record(tree: TreeCopy, python: WarmPython, places: Path) -> list[TestFile]:
    """Run the test files without a record in the folder `places`; returns all records.

    Raises CoverageError if `coverage` is not installed.
    """
    if importlib.util.find_spec("coverage") is None:
        raise CoverageError(
            "which test executes which line is recorded with `coverage`, which is not installed; "
            "pip install coverage"
        )
    places.mkdir(parents=True, exist_ok=True)
    recorded = []
    for path in test_files(tree.root):
        name = path.removesuffix(".py").replace("/", ".")
        place = places / f"{name}-{hash_of(tree.root / path)}.json"
        if not place.is_file():
            for old in places.glob(f"{name}-*.json"):
                old.unlink()
            found = json.dumps(_run_covered(tree, python, path))
            place.write_text(found, "utf-8")
        test = read(place)
        recorded.append(test)
        note = "  FAILS" if test.failure else ""
        print(f"{test.seconds:7.1f} s {path}{note}", file=sys.stderr, flush=True)
    return recorded


def read(place: Path) -> TestFile:
    """Read the record of a test file."""
    found = json.loads(place.read_text("utf-8"))
    lines = {path: frozenset(numbers) for path, numbers in found.pop("lines").items()}
    return TestFile(lines=lines, **found)


def hash_of(path: Path) -> str:
    """Return 16 digits of the hash of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _run_covered(tree: TreeCopy, python: WarmPython, path: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "coveragerc"
        settings.write_text(_SETTINGS.format(folder=folder, root=tree.root))
        (Path(folder) / "sitecustomize.py").write_text(_SITE)
        environment = {
            "PYTHONPATH": os.pathsep.join([folder, tree.environment()["PYTHONPATH"]]),
            "COVERAGE_PROCESS_START": str(settings),
        }
        run = python.run(
            [path], limit_s=LIMIT_S, coverage_settings=settings, environment=environment
        )
        if run.outcome != "passed":  # some tests check imports or files and fail under coverage
            run = python.run([path], limit_s=LIMIT_S)
        lines = _executed(tree, Path(folder), settings)
    return {
        "path": path,
        "seconds": run.seconds,
        "failure": "" if run.outcome == "passed" else run.output[-2000:],
        "lines": lines,
        "hashes": {each: hash_of(tree.root / each) for each in lines},
    }


def _executed(tree: TreeCopy, folder: Path, settings: Path) -> dict[str, list[int]]:
    """Return executed lines by source file, from all processes of a run."""
    import coverage

    data = coverage.Coverage(data_file=str(folder / "data"), config_file=str(settings))
    data.combine([str(folder)])
    found = data.get_data()
    return {
        str(Path(each).relative_to(tree.root)): sorted(found.lines(each) or [])
        for each in found.measured_files()
        if Path(each).is_relative_to(tree.root)
    }
