"""Common code of the bench programs: flags, head, fair timing and the last line.

head       the bench, the machine and its load, the versions and the settings
timing     compared code runs in turn within one process, after a warm-up round, so that other load
           affects all; the figures are medians
last line  one line of JSON with the head and the figures; with `--json` all other output goes to
           stderr
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deeptalk_edge import host

BUNDLE, KERNEL_BUNDLE = Path("bundles/tiny"), Path("bundles/tiny-int8")
TINY, OFFICIAL_SIZE = Path("checkpoints/tiny"), Path("checkpoints/official-size")


def spoken_questions(pattern: str = "*.wav") -> list[Path]:
    """Return the tiny checkpoint's recordings."""
    return sorted((TINY / "questions").glob(pattern))


def arguments(name: str, description: str | None) -> argparse.ArgumentParser:
    """Make the parser of the bench `name`; the description's first line is its help."""
    summary = (description or "").strip().splitlines()[0]
    parser = argparse.ArgumentParser(prog=f"bench {name}", description=summary)
    parser.add_argument("--json", action="store_true", help="only the last line on stdout")
    parser.set_defaults(bench=name)
    return parser


@contextmanager
def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Print the head, run the block, and print the dict that it fills as the last line."""
    settings = {
        name: value for name, value in sorted(vars(args).items()) if name not in ("json", "bench")
    }
    head = {"bench": args.bench, "machine": machine(), "settings": settings}
    figures: dict[str, Any] = {}
    shown = contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()
    with shown:
        said = " ".join(f"{name}={_spelled(value)}" for name, value in settings.items())
        print(f"bench {args.bench}: {head['machine']['summary']}\n{said}\n", flush=True)
        yield figures
    print(json.dumps({**head, "figures": figures}, default=str), flush=True)


def machine() -> dict[str, Any]:
    """Describe the machine, on which figures depend."""
    versions = {name: version(name) for name in ("numpy", "onnxruntime")}
    load = os.getloadavg()[0]
    summary = (
        f"{host.processor()}, {host.num_cores()} cores, load {load:.1f}, Python "
        f"{platform.python_version()}, "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
    )
    return {
        "summary": summary,
        "processor": host.processor(),
        "cores": host.num_cores(),
        "load": load,
        "python": platform.python_version(),
        **versions,
    }


def interleaved(
    ways: Mapping[str, Callable[[], object]], *, rounds: int, warm_up: int = 1
) -> dict[str, float]:
    """Run every way in turn; returns the median time of each in ms without warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for done in range(warm_up + rounds):
        for name, run in ways.items():
            start_s = time.perf_counter()
            run()
            if done >= warm_up:
                times[name].append((time.perf_counter() - start_s) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def _spelled(value: object) -> str:
    if isinstance(value, list):
        shown = ",".join(map(str, value[:3]))
        return f"{shown},... ({len(value)})" if len(value) > 3 else shown
    return str(value)
