"""Plants one fault in the copy and runs the tests that could catch it.

Tests that execute the faulty line run in the order of relevance: the test file that mirrors the
source, its neighbours, then those that execute most of its module per second. The first `quick_s`
seconds of them run together; if they pass, `thorough_s` of the others.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from deeptalk_edge.bench.mutants.coverage_map import TestFile, covering
from deeptalk_edge.bench.mutants.fault import Fault
from deeptalk_edge.bench.mutants.tree import TreeCopy
from deeptalk_edge.bench.mutants.warm import TestRun, WarmPython

# Every test that opens the library runs a C++ source.
_OPENED_BY = {
    "native/cpu": "runtime/backends/cpu/library.py",
    "native/tensorrt_plugin": "bench/gpu/moe_library.py",
}
_LIBRARY = "deeptalk_edge/libdeeptalk_cpu.so"
_BUILD_LIBRARY = [sys.executable, "native/cpu/build.py", _LIBRARY]
_HOST_KERNELS = "build/libdt_moe_host.so"
_BUILD_KERNELS = """
import shutil
from pathlib import Path
from deeptalk_edge.bench.gpu.moe_library import build_host
build_host(Path("build"), shutil.which("g++"))
"""

Status = Literal["caught", "timeout", "survived", "invalid", "doubtful"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Result of a fault. `invalid`: it does not compile, or compiles to the same code.
    `doubtful`: its tests take too long without it as well."""

    status: Status
    caught_by: str
    """The first failing test; empty after a hang or a crash."""

    tests: list[str]
    seconds: float


@dataclass(kw_only=True)
class Trials:
    """Runs trials in one copy."""

    tree: TreeCopy
    python: WarmPython
    tests: Sequence[TestFile]
    quick_s: float
    thorough_s: float
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each test file when it last passed; updated by trials."""

    least_cpu_s: float = 30.0
    """Processor time after which a run counts as a hang, plus three times the recorded time of its
    tests. The wall-clock limit is ten times as long, because the machine may be busy."""

    _sound_code: dict[str, bytes | None] = field(default_factory=dict)

    def run(self, fault: Fault) -> Verdict:
        """Plant `fault`, run the tests, and restore the file."""
        text = (self.tree.root / fault.path).read_text("utf-8")
        sound_code = self._sound_code_of(fault)
        # Before it is planted: the map of tests knows the lines of the sound file only.
        stages = _stages(self._chosen(fault), self.quick_s, self.thorough_s)
        with self.tree.planted(fault.path, fault.planted_in(text)):
            code = self._compiled(fault)
            if code is None or code == sound_code:
                verdict = Verdict(status="invalid", caught_by="", tests=[], seconds=0.0)
            else:
                verdict = self._tried(stages)
        if sound_code:
            self._library_of(fault).write_bytes(sound_code)
        if verdict.status == "timeout":
            last = stages[len(verdict.tests) > len(stages[0])]
            if self._run(last).outcome == "timeout":
                return replace(verdict, status="doubtful")
        return verdict

    def failing_without_faults(self, names: set[str]) -> set[str]:
        """Return those of the failed tests that also fail without a fault."""
        tests = {name.partition("[")[0] for name in names}
        if not tests:
            return set()
        run = self.python.run(sorted(tests), limit_s=3600.0, until_failure=False)
        failed = {name.partition("[")[0] for name in failing_tests(run.output)}
        return {name for name in names if name.partition("[")[0] in failed}

    def _tried(self, stages: Sequence[list[TestFile]]) -> Verdict:
        ran: list[str] = []
        seconds = 0.0
        for stage in filter(None, stages):
            run = self._run(stage)
            ran, seconds = [*ran, *(test.path for test in stage)], seconds + run.seconds
            if run.outcome == "timeout":
                return Verdict(status="timeout", caught_by="", tests=ran, seconds=seconds)
            if run.outcome == "failed":
                by = next(iter(failing_tests(run.output)), "")
                return Verdict(status="caught", caught_by=by, tests=ran, seconds=seconds)
        return Verdict(status="survived", caught_by="", tests=ran, seconds=seconds)

    def _run(self, stage: list[TestFile]) -> TestRun:
        """Run test files; what each takes is learnt if all pass."""
        cpu_s = self.least_cpu_s + 3 * sum(test.seconds for test in stage)
        run = self.python.run([test.path for test in stage], limit_s=10 * cpu_s, cpu_s=cpu_s)
        if run.outcome == "passed":
            self.seconds |= {test.path: 0.0 for test in stage} | seconds_by_file(run.output)
            self.tests = [
                replace(test, seconds=self.seconds.get(test.path, test.seconds))
                for test in self.tests
            ]
        return run

    def _chosen(self, fault: Fault) -> list[TestFile]:
        folder = str(Path(fault.path).parent)
        opener = _OPENED_BY.get(folder)
        if opener is None:
            return chosen(self.tests, self.tree.root, fault.path, fault.line)
        found = chosen(self.tests, self.tree.root, opener, 0)
        return sorted(found, key=lambda test: not test.path.startswith(f"tests/{folder}/"))

    def _sound_code_of(self, fault: Fault) -> bytes | None:
        kind = str(Path(fault.path).parent)
        if kind not in self._sound_code:
            self._sound_code[kind] = None if fault.path.endswith(".py") else self._compiled(fault)
        return self._sound_code[kind]

    def _compiled(self, fault: Fault) -> bytes | None:
        """Return the compiled code of the faulty file, or None if it does not compile."""
        if fault.path.endswith(".py"):
            return b""
        (self.tree.root / "build").mkdir(exist_ok=True)
        done = subprocess.run(
            _BUILD_LIBRARY if _is_of_library(fault) else [sys.executable, "-c", _BUILD_KERNELS],
            cwd=self.tree.root,
            env=self.tree.environment(),
            capture_output=True,
            check=False,
        )
        return None if done.returncode else self._library_of(fault).read_bytes()

    def _library_of(self, fault: Fault) -> Path:
        return self.tree.root / (_LIBRARY if _is_of_library(fault) else _HOST_KERNELS)


def _is_of_library(fault: Fault) -> bool:
    return fault.path.startswith("native/cpu")


def chosen(tests: Sequence[TestFile], root: Path, path: str, line: int) -> list[TestFile]:
    """Return the test files that execute `line` of `path`, the most relevant first; line 0 means
    any line of a function.

    A line that all of them execute runs at import and does not show which tests use the module. If
    no known test executes the line, the tests of its folder are returned.
    """
    users = [test for test in tests if path in test.lines and not test.failure]
    imported = (
        frozenset.intersection(*(test.lines[path] for test in users)) if users else frozenset()
    )
    found = covering(tests, root, path, line) if line else users
    deep = [test for test in found if test.lines[path] - imported]
    mirror = Path("tests", path.removeprefix("deeptalk_edge/")).with_suffix("")

    def rank(test: TestFile) -> tuple[bool, bool, int, float]:
        is_mirror = test.path.startswith(str(mirror.parent / f"test_{mirror.name}"))
        depth = len(test.lines.get(path, imported) - imported) + 1
        is_near = Path(test.path).parent == mirror.parent
        far = test.steps.get(path, 0)
        return (not is_mirror, not is_near, far, -depth / (test.seconds + 1.0))

    near = [test for test in tests if Path(test.path).is_relative_to(mirror.parent)]
    return sorted(deep or found or near, key=rank)


def failing_tests(output: str) -> list[str]:
    """Return the node ids in pytest's summary."""
    return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)


def seconds_by_file(output: str) -> dict[str, float]:
    """What pytest's list of durations says of each test file."""
    found = dict[str, float]()
    for seconds, path in re.findall(
        r"^([\d.]+)s (?:setup|call|teardown) +(.+?)::", output, re.MULTILINE
    ):
        found[path] = found.get(path, 0.0) + float(seconds)
    return found


def _stages(
    tests: list[TestFile], quick_s: float, thorough_s: float
) -> tuple[list[TestFile], list[TestFile]]:
    """Split `tests` into the first `quick_s` seconds, at least one test, and `thorough_s` of the
    others."""
    spent, quick, thorough = 0.0, list[TestFile](), list[TestFile]()
    for test in tests:
        if not quick or spent + test.seconds <= quick_s:
            quick.append(test)
        elif spent + test.seconds <= quick_s + thorough_s:
            thorough.append(test)
        else:
            continue
        spent += test.seconds
    return quick, thorough
