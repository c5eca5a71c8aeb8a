"""`make bench`: how fast this machine answers with a bundle, and decodes full-size SNAC.

Medians; what is compared runs side by side in one process. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.manifest import NATIVE_CODEC, CodecEntry
from deeptalk_edge.export.codec import export_codec
from deeptalk_edge.export.native_codec import write_native_codec
from deeptalk_edge.rows import Ids
from deeptalk_edge.runtime.audio.codec import CodecGraph
from deeptalk_edge.runtime.audio.vad import read_utterance
from deeptalk_edge.runtime.backends.native_codec import NativeCodec
from deeptalk_edge.runtime.backends.native_library import LIBRARY
from deeptalk_edge.runtime.backends.ort import OrtGraph
from deeptalk_edge.runtime.bundle import Bundle
from deeptalk_edge.runtime.conversation import Conversation, ConversationSettings, TurnDone
from deeptalk_edge.spec import CodecSpec
from deeptalk_edge.training.snac import Snac

Figures = dict[str, float]

SNAC_24KHZ = CodecSpec(
    sampling_rate=24000,
    encoder_dim=48,
    encoder_rates=(2, 4, 8, 8),
    latent_dim=768,
    decoder_dim=1024,
    decoder_rates=(8, 8, 4, 2),
    codebook_size=4096,
    codebook_dim=8,
    vq_strides=(4, 2, 1),
    noise=True,
    depthwise=True,
)
"""The released codec's sizes; here with random weights, which cost the same."""

WINDOW_FRAMES = 4
"""The common way to stream SNAC decodes a window of 28 tokens for each new frame."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--wav", type=Path, nargs="+", required=True, help="spoken questions")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args(argv)
    figures: dict[str, Figures] = {
        "answers": measure_answers(args.bundle, args.wav, args.threads, args.repeat),
        "process": measure_process(args.bundle, args.wav[0], args.repeat),
        "full_size_snac": measure_codec(args.threads, 4 * args.repeat),
    }
    machine = f"{_processor()}, {args.threads} thread(s), Python {platform.python_version()}"
    print(f"{machine}; medians of {args.repeat} x {len(args.wav)} questions\n")
    for group, values in figures.items():
        print(group.replace("_", " "))
        for name, value in values.items():
            print(f"  {name:44}{value:10.2f}")
    print(json.dumps({"machine": machine, **figures}))
    return 0


def measure_answers(place: Path, wavs: list[Path], threads: int, repeat: int) -> Figures:
    """What a listener waits for, over all questions; each one opens a conversation of its own."""
    bundle = Bundle.open(place)
    settings = ConversationSettings.of(bundle, threads=threads)
    turns = []
    with Conversation(bundle, settings) as talk:
        for pcm in [read_utterance(wav) for wav in wavs] * (repeat + 1):
            talk.reset()
            done = list(talk.ask(pcm))[-1]
            assert isinstance(done, TurnDone)
            turns.append(done.metrics)
    warm = turns[len(wavs) :]  # the first round allocates
    columns: dict[str, Callable[[Any], float | None]] = {
        "end of speech to first sample, ms": lambda m: m.first_sample_ms,
        "encoder, ms": lambda m: m.encoder_ms,
        "prefill, ms": lambda m: m.prefill_ms,
        "step, ms": lambda m: m.step_ms_p50,
        "real-time factor, compute / sound": lambda m: m.real_time_factor,
    }
    return {name: statistics.median(map(_known, map(of, warm))) for name, of in columns.items()}


def measure_process(place: Path, wav: Path, repeat: int) -> Figures:
    """What a fresh process costs, its start and its imports included."""
    run = ["run", "--bundle", str(place), "--wav", str(wav), "--json"]
    cli = [sys.executable, "-m", "deeptalk_edge.cli"]
    bare = _median_ms([sys.executable, "-c", "pass"], repeat)
    return {
        "python alone, ms": bare,
        "deeptalk-edge --help, ms": _median_ms([*cli, "--help"], repeat),
        "cold start to the end of an answer, ms": _median_ms([*cli, *run], repeat),
        "resident memory after an answer, MB": _peak_resident_mb([*cli, *run]),
    }


def measure_codec(threads: int, num_frames: int) -> Figures:
    """Full-size SNAC: a new frame by state, on ONNX Runtime and on the kernels where they are
    installed, beside a new frame by the 28-token window."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, SNAC_24KHZ.codebook_size, (WINDOW_FRAMES, SNAC_24KHZ.frame_codes))
    with tempfile.TemporaryDirectory() as folder:
        weights, place = _RandomSnac(), Path(folder)
        exported = export_codec(weights, "off", place)
        entry = CodecEntry(spec=SNAC_24KHZ, noise="off", **dataclasses.asdict(exported))
        ort = OrtGraph(place / "codec.onnx", threads=threads)
        ways: dict[str, tuple[CodecGraph, Ids]] = {
            "one frame of sound, ONNX Runtime, ms": (ort, codes[:1])
        }
        if LIBRARY.is_file():
            write_native_codec(weights, "off", place / NATIVE_CODEC)
            native = NativeCodec(place / NATIVE_CODEC, entry, threads=threads)
            ways[f"one frame of sound, {native.kernel_path}, ms"] = (native, codes[:1])
        ways["one frame by a 28-token window, ms"] = (ort, codes)
        feeds: dict[str, NDArray[Any]] = {
            "position": np.array(0, np.int64),
            "length": np.array(1 << 40, np.int64),
            "state": np.zeros(entry.state_size, np.float32),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(num_frames):
            for name, (codec, frames) in ways.items():
                start_s = time.perf_counter()
                codec.run({**feeds, "codes": frames})
                times[name].append((time.perf_counter() - start_s) * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


class _RandomSnac:
    """Full-size SNAC with random weights, in the form that the codec's exporter reads."""

    spec = SNAC_24KHZ

    def __init__(self) -> None:
        state = Snac(self.spec, with_encoder=False).state_dict()
        self._tensors = {name: tensor.numpy() for name, tensor in state.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> NDArray[np.float32]:
        return np.asarray(self._tensors[name], np.float32)


def _known(value: float | None) -> float:
    if value is None:
        raise ValueError("an answer without sound cannot be measured; ask another question")
    return value


def _median_ms(command: list[str], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start_s = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append((time.perf_counter() - start_s) * 1000)
    return statistics.median(times)


def _peak_resident_mb(command: list[str]) -> float:
    """Peak resident memory of one run of a command, weights mapped from files included."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, *command], check=True, capture_output=True, text=True
    )
    return int(finished.stdout) / 1024


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
