"""Speed of a bundle's answers and of full-size SNAC on this machine.

The bundle's figures are those of `deeptalk-edge profile --offline`, measured in a separate process.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.bench.harness import BUNDLE, arguments, interleaved, measured, spoken_questions
from deeptalk_edge.bench.random_snac import SNAC_24KHZ, RandomSnac
from deeptalk_edge.bundle.manifest import NATIVE_CODEC, CodecEntry
from deeptalk_edge.export.graphs.codec import export_codec
from deeptalk_edge.export.packed.cpu_codec import write_native_codec
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.backends.cpu.codec import CpuCodec
from deeptalk_edge.runtime.backends.cpu.library import LIBRARY
from deeptalk_edge.runtime.backends.ort.backend import OrtCodec
from deeptalk_edge.runtime.lm.codec_stream import Codec
from deeptalk_edge.runtime.measure import page

Figures = dict[str, float]

CLI = (sys.executable, "-m", "deeptalk_edge.cli")

WINDOW_FRAMES = 4
"""Tokens of a window; the usual way to stream SNAC decodes a window for each new frame."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and a line of JSON."""
    parser = arguments("answers", __doc__)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument(
        "--wav", type=Path, nargs="+", default=spoken_questions("*-0.wav"), help="spoken questions"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args(argv)
    with measured(args) as figures:
        answers = measure_answers(args.bundle, args.wav, args.threads, args.repeat)
        print(page(answers), end="\n\n", flush=True)
        groups: dict[str, Figures] = {
            "process": measure_process(args.bundle, args.wav[0], args.repeat),
            "full_size_snac": measure_codec(args.threads, 4 * args.repeat),
        }
        for group, values in groups.items():
            print(group.replace("_", " "))
            for name, value in values.items():
                print(f"  {name:46}{value:10.2f}")
        figures.update({"answers": answers, **groups})
    return 0


def measure_answers(place: Path, wavs: list[Path], threads: int, repeat: int) -> dict[str, Any]:
    """Run the device's own measurement in a new process, without torch, which this one has
    loaded."""
    command = [
        *CLI,
        "profile",
        "--offline",
        "--bundle",
        str(place),
        "--wav",
        *map(str, wavs),
        "--json",
    ]
    command += ["--threads", str(threads), "--repeat", str(repeat)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report: dict[str, Any] = json.loads(finished.stdout)
    return report


def measure_process(place: Path, wav: Path, repeat: int) -> Figures:
    """Measure a new process, its start and imports included."""
    run = ["run", "--bundle", str(place), "--wav", str(wav), "--json"]
    bare = _median_ms([sys.executable, "-c", "pass"], repeat)
    return {
        "python alone, ms": bare,
        "deeptalk-edge --help, ms": _median_ms([*CLI, "--help"], repeat),
        "cold start to the end of an answer, ms": _median_ms([*CLI, *run], repeat),
    }


def measure_codec(threads: int, num_frames: int) -> Figures:
    """Measure full-size SNAC: a new frame with a state, on ONNX Runtime and on the installed
    kernels, and a new frame by the 28-token window."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, SNAC_24KHZ.codebook_size, (WINDOW_FRAMES, SNAC_24KHZ.frame_codes))
    with tempfile.TemporaryDirectory() as folder:
        weights, place = RandomSnac(SNAC_24KHZ), Path(folder)
        exported = export_codec(weights, "off", place)
        entry = CodecEntry(spec=SNAC_24KHZ, noise="off", **dataclasses.asdict(exported))
        ort = OrtCodec(place / "codec.onnx", threads=threads)
        ways: dict[str, tuple[Codec, Ids]] = {
            "one frame of sound, ONNX Runtime, ms": (ort, codes[:1])
        }
        if LIBRARY.is_file():
            write_native_codec(weights, "off", place / NATIVE_CODEC)
            native = CpuCodec(place / NATIVE_CODEC, entry, threads=threads)
            ways[f"one frame of sound, {native.kernel_path}, ms"] = (native, codes[:1])
        ways["one frame by a 28-token window, ms"] = (ort, codes)
        state = np.zeros(entry.state_size, np.float32)
        decode = {
            name: partial(codec.decode, frames, position=0, length=1 << 40, state=state, noise=[])
            for name, (codec, frames) in ways.items()
        }
        return interleaved(decode, rounds=num_frames)


def _median_ms(command: list[str], repeat: int) -> float:
    run = partial(subprocess.run, command, check=True, stdout=subprocess.DEVNULL)
    return interleaved({"": run}, rounds=repeat, warm_up=0)[""]
