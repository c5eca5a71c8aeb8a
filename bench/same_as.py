"""Checks that this checkout behaves like another commit: `bench same_as BASE`.

Both run in turn through the command line only, so the places of their sources may differ:

graphs     every file of the exported bundles, except records of versions and times
answers    text and sound of the shipped spoken questions, on both backends, single and
           batch-parallel, with several pool sizes
dialogue   four turns in one conversation
loop       the counts of hours of simulated conversation, from several seeds

It prints the number of observations and of differences, and exits with 1 if there are any.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from deeptalk_edge.bench.harness import TINY, arguments, measured, spoken_questions

DEVICES = ("cpu", "cpu-int8", "agx-orin-64gb", "thor")
POOLS = ("100%", "42%", "8")
SEEDS = (1, 2, 3)
_VERSIONS = {"manifest.json", "parity.json"}
_OF_THE_MACHINE = {"peak_resident_mb", "memory_growth_kb", "wall_s", "seconds"}

Observations = dict[str, str]
"""Observations by name: the SHA-256 or the value."""


def main(argv: list[str] | None = None) -> int:
    """Compare; returns 1 if anything differs."""
    parser = arguments("same_as", __doc__)
    parser.add_argument("base", help="a commit")
    parser.add_argument("--work", type=Path, default=Path("build/same_as"))
    parser.add_argument("--every", type=int, default=1, help="ask one question in so many")
    args = parser.parse_args(argv)
    args.work = args.work.resolve()  # the working directory differs for each checkout
    args.work.mkdir(parents=True, exist_ok=True)
    with measured(args) as figures, _worktree(args.base, args.work / "base") as base:
        before = observe(base, args.work / "of_base", args)
        after = observe(Path.cwd(), args.work / "of_this", args)
        wrong = differing(before, after)
        for name in wrong:
            print(f"differs: {name}")
        print(f"{len(before | after)} compared, {len(wrong)} differ")
        figures.update({"compared": len(before | after), "differ": wrong})
    return 1 if wrong else 0


def differing(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """Return the names of observations that differ or are missing on one side."""
    return sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )


def observe(tree: Path, work: Path, args: argparse.Namespace) -> Observations:
    """Make all observations of one checkout."""
    seen: Observations = {}
    work.mkdir(parents=True, exist_ok=True)
    for device in DEVICES:
        flags = ["--device", device, "--force", "-o", str(work / device)]
        _cli(tree, "export", str(Path.cwd() / TINY), *flags)
        seen |= _files(work / device)
    questions = list(map(str, spoken_questions()[:: args.every]))
    for device, backend in (("cpu", "ort"), ("cpu-int8", "ort"), ("cpu-int8", "native")):
        bundle = ["--bundle", str(work / device), "--backend", backend]
        for mode in ("single", "batch-parallel"):
            name = f"{device}, {backend}, {mode}"
            flags = [*bundle, "--mode", mode, "--forget"]
            seen |= _answers(tree, name, flags, questions, work / "out")
        seen |= _answers(
            tree, f"{device}, {backend}, dialogue", bundle, questions[:4], work / "out"
        )
        for pool in POOLS:
            flags = [*bundle, "--pool", pool, "--forget"]
            name = f"{device}, {backend}, pool {pool}"
            seen |= _answers(tree, name, flags, questions[:2], work / "out")
    for seed in SEEDS:
        seen |= _loop(tree, seed)
    return seen


def _files(bundle: Path) -> Observations:
    return {
        f"{bundle.name}/{path.relative_to(bundle)}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in bundle.rglob("*")
        if path.is_file() and path.name not in _VERSIONS
    }


def _answers(tree: Path, name: str, flags: list[str], wavs: list[str], out: Path) -> Observations:
    """Return text and sound of each turn."""
    out.mkdir(exist_ok=True)
    for old in out.iterdir():
        old.unlink()
    said = _cli(tree, "run", *flags, "--json", "--out", str(out / "answer.wav"), "--wav", *wavs)
    turns = [json.loads(line) for line in said.splitlines()]
    seen = {f"{name}, text {turn}": record["text"] for turn, record in enumerate(turns)}
    seen |= {
        f"{name}, {path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.iterdir()
    }
    return seen


def _loop(tree: Path, seed: int) -> Observations:
    """Return the counts of a simulated conversation; in older commits `soak` is another module."""
    is_old = (tree / "deeptalk_edge" / "soak.py").is_file()
    program = ["deeptalk_edge.soak"] if is_old else ["deeptalk_edge.bench", "soak"]
    flags = ["--hours", "0.2", "--turns", "100", "--seed", str(seed)]
    report = json.loads(_python(tree, *program, *flags).splitlines()[-1])
    report = report.get("figures", report)
    return {
        f"loop {seed}, {name}": json.dumps(value)
        for name, value in report.items()
        if name not in _OF_THE_MACHINE
    }


def _cli(tree: Path, *words: str) -> str:
    return _python(tree, "deeptalk_edge.cli", *words)


def _python(tree: Path, module: str, *words: str) -> str:
    """Run a module of a checkout; returns its output.

    Raises CalledProcessError if it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


@contextmanager
def _worktree(commit: str, place: Path) -> Iterator[Path]:
    """Context of a temporary checkout of a commit, with its own kernels built."""
    place = place.resolve()
    subprocess.run(["git", "worktree", "add", "--detach", "--force", place, commit], check=True)
    try:
        library = "deeptalk_edge/libdeeptalk_cpu.so"
        subprocess.run([sys.executable, "native/cpu/build.py", library], cwd=place, check=True)
        yield place
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", place], check=True)
