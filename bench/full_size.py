"""Asks spoken questions to a model of the official size on this machine's CPU.

The bundle is exported from random weights, and encoder, prefill, paged experts and codec run as in
a real conversation. Random weights do not show a trained model's answers, their length or the
locality of its routes: random routes change fast, which is the worst case for a small pool. Each
row is a separate process. The last line of the output is JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import statistics
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

from deeptalk_edge import host
from deeptalk_edge.bench.harness import OFFICIAL_SIZE, TINY, arguments, measured, spoken_questions
from deeptalk_edge.bench.random_checkpoint import RandomCheckpoint, write_sizes
from deeptalk_edge.bundle.manifest import MANIFEST
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.checkpoint.config import read_model_spec
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.files import scratch_directory
from deeptalk_edge.runtime.audio.vad import read_utterance
from deeptalk_edge.runtime.conversation import (
    Conversation,
    ConversationSettings,
    Metrics,
    TurnDone,
)
from deeptalk_edge.runtime.experts.open import PagingSettings
from deeptalk_edge.runtime.lm.encoder import EncoderWindow

HEADER = (
    f"{'threads':>7} {'pool':>5} {'window':6}{'load s':>8}{'first sample ms':>17}{'encoder':>9}"
    f"{'prefill':>9}{'rows':>6}{'step ms':>9}{'p95':>7}{'compute/sound':>15}{'memory GB':>11}"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One row of the table."""

    threads: int
    pool: str
    window: EncoderWindow


def main(argv: list[str] | None = None) -> int:
    """Export, measure, print a table and a line of JSON."""
    parser = arguments("full_size", __doc__)
    parser.add_argument("--like", type=Path, default=OFFICIAL_SIZE, help="config files")
    parser.add_argument("--tokenizer", type=Path, default=TINY / "tokenizer.json")
    parser.add_argument(
        "--wav", type=Path, nargs="+", default=spoken_questions("*-0.wav"), help="spoken questions"
    )
    parser.add_argument("--work", type=Path, default="build/full_size", help="scratch: 15 GB")
    parser.add_argument("--precision", nargs="+", default=["experts=int4:64"], metavar="PART=DTYPE")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pool", nargs="+", default=["100%", "42%"], help="experts in memory")
    windows = get_args(EncoderWindow)
    parser.add_argument("--window", nargs="+", choices=windows, default=windows)
    parser.add_argument("--rows", type=int, default=48, help="of an answer")
    parser.add_argument("--pause", type=float, default=4.0, help="seconds before a question")
    parser.add_argument("--keep", action="store_true", help="leave the bundle for the next run")
    args = parser.parse_args(argv)
    with measured(args) as figures:
        bundle = args.work / "+".join(args.precision)  # a kept bundle fits only its precision
        with scratch_directory(args.work, keep=args.keep):
            if not (bundle / MANIFEST).is_file():
                write_bundle(args.like, args.tokenizer, args.precision, bundle)
            print(HEADER, flush=True)
            rows = []
            for choice in itertools.product(args.threads, args.pool, args.window):
                run = Run(threads=choice[0], pool=choice[1], window=choice[2])
                with get_context("spawn").Pool(1) as process:
                    row = process.apply(measure, (bundle, args.wav, run, args.rows, args.pause))
                rows.append(row)
                print(_line(row), flush=True)
            figures["rows"] = rows
    return 0


def write_bundle(like: Path, tokenizer: Path, precision: list[str], place: Path) -> None:
    """Export random weights with the sizes of `like` for the CPU kernels."""
    sizes = place.with_name("checkpoint")
    shutil.rmtree(sizes, ignore_errors=True)  # left by a killed run
    write_sizes(like, sizes)
    shutil.copyfile(tokenizer, sizes / "tokenizer.json")
    profile = load_profile("cpu-int8").with_precision(precision)
    export_bundle(
        sizes,
        place,
        ExportSettings(profile=profile),
        lambda step, done, total: print(f"{done}/{total} {step}", file=sys.stderr),
        checkpoint=RandomCheckpoint(read_model_spec(sizes), sizes / "snac"),
    )


def measure(
    place: Path, wavs: list[Path], run: Run, num_rows: int, pause_s: float
) -> dict[str, Any]:
    """Ask every question in a new conversation, the first one also before, to warm up."""
    start_s = time.perf_counter()
    bundle = Bundle.open(place)
    settings = dataclasses.replace(
        ConversationSettings.of(bundle, threads=run.threads),
        max_rows=num_rows,
        encoder_window=run.window,
        paging=PagingSettings(pool=run.pool),
    )
    with Conversation(bundle, settings) as talk:
        load_s = time.perf_counter() - start_s
        turns = [_ask(talk, wav, pause_s) for wav in [wavs[0], *wavs]][1:]

    def median(name: str) -> float:
        return float(statistics.median(getattr(turn, name) for turn in turns))

    return {
        **dataclasses.asdict(run),
        "load_s": load_s,
        "first_sample_ms": median("first_sample_ms"),
        "encoder_ms": median("encoder_ms"),
        "prefill_ms": median("prefill_ms"),
        "prompt_rows": median("num_prompt_rows"),
        "step_ms": median("step_ms_p50"),
        "step_ms_p95": median("step_ms_p95"),
        "real_time_factor": median("real_time_factor"),
        "memory_gb": (host.peak_resident_mb() or 0.0) / 1e3,
    }


def _ask(talk: Conversation, wav: Path, pause_s: float) -> Metrics:
    """Ask as a live conversation does: the rows before the question are fed, and free slots filled,
    before the wait begins."""
    talk.reset()
    talk.idle()
    time.sleep(pause_s)
    talk.user_started_speaking()
    done = list(talk.ask(read_utterance(wav)))[-1]
    assert isinstance(done, TurnDone)
    return done.metrics


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['threads']:>7} {row['pool']:>5} {row['window']:6}{row['load_s']:8.1f}"
        f"{row['first_sample_ms']:17.0f}{row['encoder_ms']:9.0f}{row['prefill_ms']:9.0f}"
        f"{row['prompt_rows']:6.0f}{row['step_ms']:9.1f}{row['step_ms_p95']:7.1f}"
        f"{row['real_time_factor']:15.2f}{row['memory_gb']:11.1f}"
    )
