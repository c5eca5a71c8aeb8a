"""`bench mutants --seed S`: plants one-line faults, runs the tests, and reports the caught ones.

A seed draws the faults from runtime, export, calibration, training, the modules they share and the
C++ kernels. Each is planted in a private copy; the checkout is never written. Tests are chosen by
the lines that they execute, which are recorded once in build/mutants; that takes about as long as
the test suite. Results are kept as JSON lines; an interrupted run continues from them.

Reasons for our own tool: we need a seeded sample over many files, tests chosen for each fault, a
package whose folders are links (deeptalk_edge/runtime -> ../runtime), and C++. mutmut 3.8 chooses
tests, but changes only functions, all of them, and no C++. cosmic-ray 8 runs one test command for
all faults. mutatest samples by a seed, but rewrites __pycache__ and was made for Python 3.7. We use
`coverage` to record executed lines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deeptalk_edge.bench.mutants.coverage_map import record
from deeptalk_edge.bench.mutants.fault import Fault
from deeptalk_edge.bench.mutants.imports import importing
from deeptalk_edge.bench.mutants.sample import ROOMS, draws, schedule
from deeptalk_edge.bench.mutants.tree import TreeCopy
from deeptalk_edge.bench.mutants.trial import Trials
from deeptalk_edge.bench.mutants.warm import WarmPython
from deeptalk_edge.errors import EdgeError

ROOT = Path(__file__).resolve().parents[2]
GOAL = 0.9

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Try the faults; print each one, diffs of the survivors, and a line of JSON."""
    parser = argparse.ArgumentParser(prog="bench mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=200)
    rooms = [room.name for room in ROOMS]
    parser.add_argument("--room", nargs="+", choices=rooms, default=rooms, help="of those, only")
    parser.add_argument("--json", action="store_true", help="only lines of JSON, one a fault")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "mutants")
    parser.add_argument("--quick", type=float, default=30.0, help="seconds of tests at first")
    parser.add_argument("--thorough", type=float, default=240.0, help="if those pass")
    parser.add_argument(
        "--by-imports", action="store_true", help="record nothing: a test runs what it imports"
    )
    parser.add_argument("--survivors", action="store_true", help="try the survivors again")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copy is removed
    try:
        return _run(args)
    except EdgeError as error:
        print(f"bench mutants: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    head = _head(args)
    _say(args, json.dumps(head) if args.json else _head_line(head))
    rows = []
    with _trials(args) as trials:
        for row in _rows(args, trials):
            rows.append(row)
            _say(args, json.dumps(row) if args.json else _row_line(row))
        doubtful = trials.failing_without_faults({row["caught_by"] for row in rows} - {""})
    rows = [row | {"status": "doubtful"} if row["caught_by"] in doubtful else row for row in rows]
    summary = head | _summary(rows)
    if not args.json:
        _say(args, *(f"\n{row['diff']}" for row in rows if not _is_caught(row)))
    print(json.dumps(summary))
    return 0 if summary["caught_share"] >= GOAL else 1


@contextmanager
def _trials(args: argparse.Namespace) -> Iterator[Trials]:
    """Make a copy that is ready for faults."""
    with tempfile.TemporaryDirectory(prefix="deeptalk-mutants-") as folder:
        tree = TreeCopy(ROOT, Path(folder) / "tree")
        tree.put_before_compilers(args.work / "objects")
        tree.compile_bytecode(sys.executable)
        _build_library(tree)
        with WarmPython(tree) as python:
            timed = args.work / "seconds.json"
            seconds = json.loads(timed.read_text("utf-8")) if timed.is_file() else {}
            tests = (
                importing(tree.root, seconds)
                if args.by_imports
                else record(tree, python, args.work / "coverage")
            )
            try:
                yield Trials(
                    tree=tree,
                    python=python,
                    tests=tests,
                    quick_s=args.quick,
                    thorough_s=args.thorough,
                    seconds=seconds,
                )
            finally:
                timed.write_text(json.dumps(seconds, indent=1), "utf-8")


def _build_library(tree: TreeCopy) -> None:
    """Build the CPU library that tests share, so that the first test does not have to."""
    command = "from tests.native.cpu.built import library_place; library_place()"
    environment = tree.environment()
    subprocess.run([sys.executable, "-c", command], cwd=tree.root, env=environment, check=True)


def _rows(args: argparse.Namespace, trials: Trials) -> Iterator[Row]:
    """Yield one row per fault that compiles, from the file of results if it was tried before."""
    place = args.work / f"seed-{args.seed}.jsonl"
    kept = {row["name"]: row for row in _kept(place)}
    drawn = draws(ROOT, args.seed)
    with place.open("a", encoding="utf-8") as results:
        for room in schedule(ROOT, args.seed, args.count):
            if room not in args.room:
                continue
            for fault in drawn[room]:
                row = kept.get(fault.name)
                if row is None or (args.survivors and row["status"] == "survived"):
                    row = _tried(trials, room, fault)
                    results.write(json.dumps(row) + "\n")
                    results.flush()
                if row["status"] != "invalid":
                    yield row
                    break


def _tried(trials: Trials, room: str, fault: Fault) -> Row:
    text = (trials.tree.root / fault.path).read_text("utf-8")
    verdict = asdict(trials.run(fault))
    return {"name": fault.name, "room": room, **asdict(fault), **verdict, "diff": fault.diff(text)}


def _kept(place: Path) -> list[Row]:
    if not place.is_file():
        return []
    return [json.loads(line) for line in place.read_text("utf-8").splitlines()]


def _is_caught(row: Row) -> bool:
    """Whether the fault was caught; not if the test also fails without it, which is `doubtful`."""
    return row["status"] in ("caught", "timeout")


def _summary(rows: list[Row]) -> Row:
    noticed = [row for row in rows if _is_caught(row)]
    statuses = Counter(row["status"] for row in rows)
    rooms = Counter(row["room"] for row in rows)
    return {
        "faults": len(rows),
        **{status: statuses[status] for status in ("caught", "timeout", "survived", "doubtful")},
        "caught_share": round(len(noticed) / max(1, len(rows)), 4),
        "rooms": {
            name: f"{sum(row['room'] == name for row in noticed)} of {count}"
            for name, count in sorted(rooms.items())
        },
        "seconds": round(sum(row["seconds"] for row in rows)),
    }


def _head(args: argparse.Namespace) -> Row:
    """Print machine, settings and commit."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "bench": "mutants",
        "seed": args.seed,
        "count": args.count,
        "tests_by": "imports" if args.by_imports else "coverage",
        "quick_s": args.quick,
        "thorough_s": args.thorough,
        "commit": commit,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _head_line(head: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in head.items())


def _row_line(row: Row) -> str:
    by = row["caught_by"] or row["status"]
    return f"{row['status']:8} {row['seconds']:6.1f} s  {row['name']}  [{by}]"


def _say(args: argparse.Namespace, *lines: str) -> None:
    for line in lines:
        print(line, flush=True)
