"""Runs mutations of one bundle in child processes and counts their outcomes."""

from __future__ import annotations

import collections
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.bundle.mutations import Mutation

_PATIENCE_S = 60.0


@dataclass
class Report:
    """Number of mutations by outcome."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    """Crashes, hangs, tracebacks, and answers that differ."""
    changed: list[str] = field(default_factory=list)
    """Mutations that were accepted and gave another answer."""

    def __str__(self) -> str:
        counted = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        return f"{sum(self.counts.values())} mutations: {counted}"


class Child:
    """A process that opens bundles; restarted after a mutation has ended it."""

    def __init__(self, backend: str, library: Path | None, environment: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-m", "tests.bundle.sweep_child", backend]
        self._command += [str(library)] if library else []
        self._environment = {**os.environ, **environment}
        self._start()

    def open(self, place: Path) -> tuple[str, str]:
        """Outcome of a bundle: `answered`, `refused`, `traceback`, `crash` or `hang`."""
        self._orders.write(f"{place}\n".encode())
        self._orders.flush()
        ready, _, _ = select.select([self._outcomes], [], [], _PATIENCE_S)
        line = self._outcomes.readline() if ready else b""
        if line:
            what, detail = json.loads(line)
            return str(what), str(detail)
        code = self._process.poll() if not ready else self._process.wait()
        self.close()
        self._start()
        return ("hang", f"{_PATIENCE_S:.0f} s") if code is None else ("crash", f"exit code {code}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._orders.close()
        self._outcomes.close()

    def _start(self) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, env=self._environment
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._outcomes = self._process.stdin, self._process.stdout


def sweep(
    bundle: Path,
    mutations: Iterable[Mutation],
    work: Path,
    *,
    backend: str,
    library: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Report:
    """Apply each mutation to a copy of the bundle and ask it two questions."""
    report, child = Report(), Child(backend, library, environment or {})
    try:
        right = child.open(bundle)
        assert right[0] == "answered", right
        for mutation in mutations:
            place = _copy(bundle, work / "bundle")
            mutation.apply(place)
            what, detail = child.open(place)
            if what == "answered":
                what = "same answer" if detail == right[1] else "other answer"
            report.counts[what] += 1
            if what == "other answer":
                report.changed.append(mutation.name)
            elif what not in ("same answer", "refused"):
                report.faults.append(f"{mutation.name}: {what}: {detail}")
    finally:
        child.close()
    return report


def _copy(bundle: Path, place: Path) -> Path:
    """Hard links: mutations replace files and never write into them."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(bundle, place, copy_function=os.link)
    return place
