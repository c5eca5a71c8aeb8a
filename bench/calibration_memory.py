"""Measures the memory of a calibration at official width, by number of layers, and projects it.

Checkpoints have the official sizes, random weights and few layers. `calibrate` observes the float
model with a fixed pool of experts, and quantises them to int4:128. Its exports run in other
processes, which are not counted (`bench export_memory` measures them). Anonymous pages are needed;
mapped pages, those of the tokens and the weights, the kernel may drop. The projection to all layers
is a line through two sizes: computed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from deeptalk_edge.bench.export_memory import write_random_checkpoint
from deeptalk_edge.bench.harness import OFFICIAL_SIZE, TINY, arguments, measured
from deeptalk_edge.checkpoint.config import read_model_spec
from deeptalk_edge.files import scratch_directory

_SAMPLE_S = 0.02
_QUESTIONS = "where is the next train to berlin\nhow much is a ticket to bremen\n" * 4
_GENERATION = {"deeptalk": {"max_rows": 16, "context_rows": 512}}


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and a line of JSON."""
    parser = arguments("calibration_memory", __doc__)
    parser.add_argument("--like", type=Path, default=OFFICIAL_SIZE, help="config files")
    parser.add_argument("--work", type=Path, default="build/calibration_memory", help="30 GB")
    parser.add_argument("--layers", type=int, nargs=2, default=[2, 4])
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--pool", default="32", help="experts in memory: 32 are 1.1 GB in float32")
    args = parser.parse_args(argv)
    with measured(args) as figures:
        print(f"{'layers':>6}{'anonymous':>12}{'mapped':>10}{'time':>9}")
        with scratch_directory(args.work):
            rows = [_measure(args.like, args.work / str(n), n, args) for n in args.layers]
        few, many = args.layers
        whole = read_model_spec(args.like).decoder.num_layers
        slope = (rows[1]["anonymous_mb"] - rows[0]["anonymous_mb"]) / (many - few)
        projected = rows[0]["anonymous_mb"] + slope * (whole - few)
        print(f"{slope:.0f} MB a layer; {whole} layers, projected: {projected:.0f} MB anonymous")
        figures.update(
            {
                "layers": dict(zip(map(str, args.layers), rows, strict=True)),
                "anonymous_mb_per_layer": round(slope, 1),
                "projected_mb": round(projected),
            }
        )
    return 0


def _measure(like: Path, place: Path, layers: int, args: argparse.Namespace) -> dict[str, float]:
    shutil.rmtree(place, ignore_errors=True)
    checkpoint = place / "checkpoint"
    try:
        write_random_checkpoint(like, checkpoint, layers)
        shutil.copyfile(TINY / "tokenizer.json", checkpoint / "tokenizer.json")
        (checkpoint / "generation_config.json").write_text(json.dumps(_GENERATION))
        (place / "questions.txt").write_text(_QUESTIONS)
        command = [sys.executable, "-m", "deeptalk_edge.cli", "calibrate", str(checkpoint)]
        command += ["--utterances", str(place / "questions.txt"), "-o", str(place / "table")]
        command += ["--precision", "experts=int4:128", "--floor", "0", "--no-gate"]
        command += ["--method", args.method, "--pool", args.pool]
        began = time.monotonic()
        anonymous_mb, mapped_mb = _peaks(command)
        seconds = time.monotonic() - began
        print(
            f"{layers:>6}{anonymous_mb:>9.0f} MB{mapped_mb:>7.0f} MB{seconds:>7.0f} s", flush=True
        )
        return {"anonymous_mb": anonymous_mb, "mapped_mb": mapped_mb, "seconds": round(seconds)}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _peaks(command: list[str]) -> tuple[float, float]:
    """Run a program; returns the greatest anonymous and mapped memory of its process, in MB."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks, status = [0, 0], Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        held = [int(kb) for kb in re.findall(r"Rss(?:Anon|File):\s+(\d+) kB", status.read_text())]
        peaks = [max(pair) for pair in zip(peaks, held or peaks, strict=True)]
        time.sleep(_SAMPLE_S)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return peaks[0] * 1024 / 1e6, peaks[1] * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(main())
