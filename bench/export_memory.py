"""Measures whether an export's memory grows with the number of layers.

It writes checkpoints of official width with random weights and few layers, exports each in a child
process and samples the child's memory. An export needs its anonymous pages; the kernel may drop
pages of mapped files (the checkpoint's shards), so they are counted separately. A Jetson's bundle
is exported to its graphs; engines are built in other processes, which are not counted. The last
line of the output is JSON.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

from deeptalk_edge.bench.harness import OFFICIAL_SIZE, arguments, measured
from deeptalk_edge.bench.random_checkpoint import write_sizes
from deeptalk_edge.bundle.expert_record import to_bfloat16
from deeptalk_edge.checkpoint.config import read_model_spec
from deeptalk_edge.checkpoint.reader import expected_tensors
from deeptalk_edge.checkpoint.shards import INDEX, Shape
from deeptalk_edge.files import scratch_directory
from deeptalk_edge.model.spec import ModelSpec

_RANDOM_VALUES = (1 << 20) + 7  # not a multiple of a row, so that tokens are not equally likely
_SAMPLE_S = 0.005
_MB = 1e6

_CHILD = """
import json, re, sys, threading, time
from pathlib import Path
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.export.bundle import ExportSettings, export_bundle

settings = ExportSettings(profile=load_profile(sys.argv[4]))
peaks = {}  # step: [anonymous kB, mapped kB]
step = "start"

def watch():
    status = Path("/proc/self/status")
    while True:
        text = status.read_text()
        held = [int(kb) for kb in re.findall(r"Rss(?:Anon|File):\\s+(\\d+) kB", text)]
        peaks[step] = [max(pair) for pair in zip(held, peaks.get(step, held))]
        time.sleep(float(sys.argv[3]))

def begin(name, done, total):
    global step
    step = name

threading.Thread(target=watch, daemon=True).start()
began = time.monotonic()
export_bundle(Path(sys.argv[1]), Path(sys.argv[2]), settings, begin)
print(json.dumps({"seconds": time.monotonic() - began, "peaks_kb": dict(peaks)}))
"""


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and a line of JSON."""
    parser = arguments("export_memory", __doc__)
    parser.add_argument("--like", type=Path, default=OFFICIAL_SIZE, help="config files")
    parser.add_argument(
        "--work", type=Path, default="build/export_memory", help="scratch: 30 GB for 8 layers"
    )
    parser.add_argument("--device", default="cpu", help="a profile's name or TOML (default: cpu)")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    args = parser.parse_args(argv)
    if len(set(args.layers)) < 2:
        parser.error("--layers: name two numbers or more, to see whether memory follows them")
    with measured(args) as figures:
        print(
            f"{'layers':>6}{'checkpoint':>12}{'bundle':>10}{'anonymous':>11}{'mapped':>10}{'time':>8}"
        )
        with scratch_directory(args.work):
            peaks = {
                layers: _measure(args.like, args.work, layers, args.device)
                for layers in args.layers
            }
        first, last = peaks[args.layers[0]], peaks[args.layers[-1]]
        slope = (last["anonymous_mb"] - first["anonymous_mb"]) / (args.layers[-1] - args.layers[0])
        print(f"anonymous memory for each further layer: {slope:.1f} MB")
        figures.update({"layers": peaks, "anonymous_mb_per_layer": round(slope, 2)})
    return 0


def _measure(like: Path, work: Path, layers: int, device: str) -> dict[str, float]:
    """Write and export one checkpoint, measure that, and remove checkpoint and bundle."""
    place = work / str(layers)
    checkpoint, bundle = place / "checkpoint", place / "bundle"
    shutil.rmtree(place, ignore_errors=True)  # left by a killed run
    try:
        write_random_checkpoint(like, checkpoint, layers)
        arguments = [str(checkpoint), str(bundle), str(_SAMPLE_S), device]
        command = [sys.executable, "-c", _CHILD, *arguments]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        report = json.loads(finished.stdout)
        peaks = report["peaks_kb"]
        step = max(peaks, key=lambda name: peaks[name][0])
        figures = {
            "checkpoint_mb": _directory_mb(checkpoint),
            "bundle_mb": _directory_mb(bundle),
            "anonymous_mb": max(anonymous for anonymous, _ in peaks.values()) * 1024 / _MB,
            "mapped_mb": max(mapped for _, mapped in peaks.values()) * 1024 / _MB,
            "seconds": report["seconds"],
        }
        print(
            f"{layers:>6}{figures['checkpoint_mb']:>9.0f} MB{figures['bundle_mb']:>7.0f} MB"
            f"{figures['anonymous_mb']:>8.0f} MB{figures['mapped_mb']:>7.0f} MB"
            f"{figures['seconds']:>6.0f} s  (peak while writing: {step})",
            flush=True,
        )
        return {name: round(value, 1) for name, value in figures.items()}
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_random_checkpoint(like: Path, place: Path, num_layers: int) -> None:
    """Write a checkpoint with the sizes of `like` but `num_layers` layers: one shard for each layer
    and one for the rest, in bfloat16. All tensors repeat the same random numbers."""
    write_sizes(like, place, num_layers=num_layers)
    shards = _shards(read_model_spec(place))
    values = np.random.default_rng(1).normal(scale=0.02, size=_RANDOM_VALUES)
    block = to_bfloat16(values.astype(np.float32)).tobytes()
    for name, tensors in shards.items():
        with (place / name).open("wb") as file:
            _write_shard(file, tensors, block)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (place / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def _shards(spec: ModelSpec) -> dict[str, dict[str, Shape]]:
    shards: dict[str, dict[str, Shape]] = {}
    for tensor, shape in expected_tensors(spec).items():
        layer = re.match(r"model\.layers\.(\d+)\.", tensor)
        name = f"layer-{layer[1]}.safetensors" if layer else "rest.safetensors"
        shards.setdefault(name, {})[tensor] = shape
    return shards


def _write_shard(file: BinaryIO, tensors: dict[str, Shape], block: bytes) -> None:
    """Write a safetensors file: length of the header, header, values. Source: the safetensors
    format."""
    header, end = {}, 0
    for tensor, shape in tensors.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[tensor] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write(len(text).to_bytes(8, "little") + text)
    while end > 0:
        file.write(block[:end])
        end -= len(block)


def _directory_mb(place: Path) -> float:
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) / _MB
