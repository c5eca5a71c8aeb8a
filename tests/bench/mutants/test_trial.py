"""In a toy project a planted fault is caught, an equivalent one survives, and the checkout is
unchanged."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deeptalk_edge.bench.mutants import coverage_map
from deeptalk_edge.bench.mutants.coverage_map import TestFile, hash_of, record
from deeptalk_edge.bench.mutants.python_faults import python_faults
from deeptalk_edge.bench.mutants.tree import TreeCopy
from deeptalk_edge.bench.mutants.trial import (
    Trials,
    chosen,
    failing_tests,
    seconds_by_file,
)
from deeptalk_edge.bench.mutants.warm import WarmPython
from tests.places import ROOT

SOURCE = """
def clamp(value, low):
    if value < low:
        return low
    return value


def count(end):
    i = 0
    while i < end:
        i += 1
    return i
"""
TESTS = """
from toy.sums import clamp, count


def test_clamp():
    assert (clamp(1, 2), clamp(3, 2)) == (2, 3)


def test_count():
    assert count(3) == 3
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / "sources").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "bundles").mkdir()
    (root / "toy").symlink_to("sources")  # like our own rooms
    (root / "sources" / "sums.py").write_text(SOURCE)
    (root / "tests" / "test_sums.py").write_text(TESTS)
    (root / "bundles" / "large").write_text("only read")
    return root


@pytest.fixture
def tree(project: Path, tmp_path: Path) -> TreeCopy:
    return TreeCopy(project, tmp_path / "copy")


@pytest.fixture
def python(tree: TreeCopy) -> Iterator[WarmPython]:
    with WarmPython(tree, libraries=()) as python:
        yield python


def toy_trials(project: Path, tree: TreeCopy, python: WarmPython) -> Trials:
    test = TestFile(
        path="tests/test_sums.py",
        seconds=0.0,
        failure="",
        lines={"sources/sums.py": frozenset(range(1, SOURCE.count("\n") + 1))},
        hashes={"sources/sums.py": hash_of(project / "sources/sums.py")},
    )
    return Trials(
        tree=tree, python=python, tests=[test], quick_s=30.0, thorough_s=30.0, least_cpu_s=6.0
    )


@pytest.mark.slow
def test_the_toys_faults_are_caught_and_its_equivalent_one_survives(
    project: Path, tree: TreeCopy, python: WarmPython
) -> None:
    trials = toy_trials(project, tree, python)
    verdicts = {
        (fault.line, fault.operator): trials.run(fault)
        for fault in python_faults("sources/sums.py", SOURCE)
        if (fault.line, fault.operator) in [(3, "comparison"), (4, "dropped return")]
        or (fault.line, fault.after.strip()) == (11, "pass")
    }
    assert verdicts[3, "comparison"].status == "survived"  # `<=` clamps a low value to itself
    caught = verdicts[4, "dropped return"]
    assert (caught.status, caught.caught_by) == ("caught", "tests/test_sums.py::test_clamp")
    names = {caught.caught_by}
    assert trials.failing_without_faults(names) == set()
    (tree.root / "tests" / "test_sums.py").write_text(TESTS.replace("2, 3", "2, 4"))
    assert trials.failing_without_faults(names) == names
    assert verdicts[11, "removed statement"].status == "timeout"
    assert list(trials.seconds) == ["tests/test_sums.py"]
    assert (project / "sources" / "sums.py").read_text() == SOURCE
    assert (tree.root / "sources" / "sums.py").read_text() == SOURCE


@pytest.mark.slow
def test_a_test_that_is_slow_without_the_fault_catches_nothing(
    project: Path, tree: TreeCopy, python: WarmPython
) -> None:
    (tree.root / "tests" / "test_sums.py").write_text("def test_slow():\n    while True: pass\n")
    fault = python_faults("sources/sums.py", SOURCE)[0]
    assert toy_trials(project, tree, python).run(fault).status == "doubtful"


def test_a_recording_says_which_test_executes_which_line(
    project: Path, tree: TreeCopy, python: WarmPython, tmp_path: Path
) -> None:
    pytest.importorskip("coverage")
    recorded = record(tree, python, tmp_path / "map")
    assert [(test.path, test.failure) for test in recorded] == [("tests/test_sums.py", "")]
    assert {2, 3, 4, 5, 11} <= recorded[0].lines["sources/sums.py"]
    (project / "tests" / "test_sums.py").unlink()
    assert record(tree, python, tmp_path / "map") == recorded  # nothing runs again


def test_a_fault_is_planted_in_the_copy_and_removed_again(project: Path, tree: TreeCopy) -> None:
    place = tree.root / "sources" / "sums.py"
    stamp = place.stat().st_mtime_ns
    with tree.planted("sources/sums.py", "broken"):
        assert (tree.root / "toy" / "sums.py").read_text() == "broken"
        assert (project / "toy" / "sums.py").read_text() == SOURCE
    assert (place.read_text(), place.stat().st_mtime_ns) == (SOURCE, stamp)


def test_a_planted_file_is_not_a_link_to_the_checkout(project: Path, tree: TreeCopy) -> None:
    assert os.path.samefile(project / "bundles" / "large", tree.root / "bundles" / "large")
    with tree.planted("bundles/large", "broken"):
        assert (project / "bundles" / "large").read_text() == "only read"


def test_a_source_is_compiled_once(tree: TreeCopy, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler on this machine")
    tree.put_before_compilers(tmp_path / "objects")
    source = tmp_path / "three.cpp"
    source.write_text("int main() { return 3; }")
    first, second = tmp_path / "first", tmp_path / "second"

    def compile_to(target: Path) -> None:
        command = ["c++", "-O3", str(source), "-o", str(target)]
        subprocess.run(command, env=tree.environment(), check=True)

    compile_to(first)
    assert subprocess.run([first], check=False).returncode == 3
    (kept,) = (tmp_path / "objects").iterdir()
    kept.write_bytes(b"kept")
    compile_to(second)
    assert second.read_bytes() == b"kept"


def test_the_test_file_of_a_source_runs_first_and_importers_last(tmp_path: Path) -> None:
    def test(path: str, seconds: float, *lines: int) -> TestFile:
        return TestFile(
            path=path, seconds=seconds, failure="", lines={"a/b.py": frozenset(lines)}, hashes={}
        )

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").write_text("")
    tests = [
        test("tests/test_cli.py", 1.0, 1, 2),  # executed at import
        test("tests/a/test_other.py", 1.0, 1, 2, 5, 6),
        test("tests/a/test_b.py", 9.0, 1, 2, 5),
    ]
    order = [each.path for each in chosen(tests, tmp_path, "a/b.py", 2)]
    assert order == ["tests/a/test_b.py", "tests/a/test_other.py"]


def test_failures_are_read_from_pytests_summary() -> None:
    output = "F\n\nFAILED tests/test_a.py::test_b[1 - x] - assert 1 == 2\n1 failed\n"
    assert failing_tests(output)[0].startswith("tests/test_a.py::test_b[1")
    assert failing_tests("ERROR tests/test_a.py - ImportError\n") == ["tests/test_a.py"]
    assert failing_tests("3 passed") == []


def test_what_a_test_file_takes_is_the_sum_of_pytests_durations() -> None:
    output = (
        "0.25s setup    tests/test_a.py::test_b[1]\n"
        "2.50s call     tests/test_a.py::test_b[1]\n"
        "0.75s teardown tests/test_c.py::test_d\n"
        "(5 durations < 0.005s hidden.  Use -vv to show these durations.)\n"
    )
    assert seconds_by_file(output) == {"tests/test_a.py": 2.75, "tests/test_c.py": 0.75}


def test_no_test_that_needs_a_sound_server_is_asked() -> None:
    for path in coverage_map.test_files(ROOT):
        assert "tests.runtime.sound_card.conftest" not in (ROOT / path).read_text("utf-8")
