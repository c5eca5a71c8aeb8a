"""Test runs that start fast: torch and other slow libraries are imported once, not per run.

Starting pytest costs 5 s of processor time, of which our own modules take half a second; a fork of
a Python that has imported the rest costs only that half second.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from deeptalk_edge.bench.mutants.tree import TreeCopy

_CHILD = Path(__file__).with_name("warm_child.py")

LIBRARIES = (
    "unittest.mock", "numpy", "pytest", "hypothesis", "hypothesis.strategies", "torch",
    "torch._dynamo", "onnx", "onnxruntime", "scipy.signal", "tokenizers", "safetensors.numpy",
    "safetensors.torch", "transformers", "soxr", "webrtcvad", "ml_dtypes", "soundfile", "tqdm",
)  # fmt: skip
"""Libraries that the tests import; missing ones are skipped."""

_NO_TELEMETRY = {"ORT_DISABLE_TELEMETRY": "1"}  # before the import of onnxruntime

_PYTEST = ("-q", "-p", "no:cacheprovider", "--durations=0")

Outcome = Literal["passed", "failed", "timeout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TestRun:
    """How a run of test files ended."""

    __test__ = False

    outcome: Outcome
    seconds: float
    output: str


class WarmPython:
    """Runs the tests of one copy of the checkout, one run at a time."""

    def __init__(self, tree: TreeCopy, libraries: tuple[str, ...] = LIBRARIES) -> None:
        self._output = Path(tempfile.mkdtemp(prefix="deeptalk-mutants-")) / "output"
        self._child = subprocess.Popen(
            [sys.executable, str(_CHILD), *libraries],
            cwd=tree.root,
            env=tree.environment() | _NO_TELEMETRY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        paths: list[str],
        *,
        limit_s: float,
        until_failure: bool = True,
        cpu_s: float | None = None,
        coverage_settings: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> TestRun:
        """Run pytest on `paths`, files or tests, for at most `limit_s` of wall time and `cpu_s` of
        processor time."""
        stdin, stdout = self._child.stdin, self._child.stdout
        assert stdin is not None
        assert stdout is not None
        request = {
            "arguments": [*_PYTEST, *(["-x"] if until_failure else []), *paths],
            "limit_s": limit_s,
            "cpu_s": cpu_s,
            "output": str(self._output),
            "coverage": str(coverage_settings) if coverage_settings else None,
            "environment": environment or {},
        }
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        return TestRun(
            outcome=_outcome(answer["code"]),
            seconds=answer["seconds"],
            output=self._output.read_text("utf-8", "replace"),
        )

    def close(self) -> None:
        """End the warm process and its children."""
        self._child.kill()
        self._child.communicate()
        self._output.unlink(missing_ok=True)
        self._output.parent.rmdir()

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _outcome(code: int | None) -> Outcome:
    if code in (None, -signal.SIGXCPU):
        return "timeout"
    return "passed" if code in (0, 5) else "failed"  # 5: no test was selected
