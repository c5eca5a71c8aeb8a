"""`deeptalk-edge calibrate CHECKPOINT --utterances DIR -o TABLE`: measure, quantise, prove.

A checkpoint is enough. The float bundle that is observed, and the quantised one that the gate asks,
are exported by child processes of this command (`export` is a layer above, and a bundle is made in
one way only); `--bundle` spares the first where a float bundle is at hand.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeptalk_edge.flags import count, count_or_zero

if TYPE_CHECKING:  # loading these takes longer than `--help` may
    from deeptalk_edge.bundle.reader import Bundle
    from deeptalk_edge.calibration.calibrate import CalibrateSettings, Findings
    from deeptalk_edge.calibration.corpus import Corpus
    from deeptalk_edge.calibration.layer import Method
    from deeptalk_edge.devices.profile import DeviceProfile
    from deeptalk_edge.model.spec import ModelSpec

log = logging.getLogger(__name__)

_METHODS = ("rtn", "mse", "awq", "gptq", "smoothquant")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `calibrate`."""
    parser.add_argument("checkpoint", type=Path, help="a directory in the official layout")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="TABLE")
    parser.add_argument(
        "--utterances",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="WAVs, dialogues (.json) and texts (.txt), or folders of them (default: a few made "
        "here, enough for a trial)",
    )
    parser.add_argument(
        "--device",
        default="cpu-int8",
        metavar="DEVICE",
        help="a profile's name or TOML (default: cpu-int8)",
    )
    parser.add_argument(
        "--precision",
        action="append",
        default=[],
        metavar="PART=DTYPE",
        help="instead of the device's: experts=int8, experts=int4:32; repeatable",
    )
    parser.add_argument(
        "--method",
        choices=_METHODS,
        help="how scales are chosen (default: gptq for int4 experts, mse for int8)",
    )
    parser.add_argument(
        "--budget",
        metavar="SIZE",
        help="bytes of the whole bundle, such as 5.2GB: precision is chosen by layer to meet it",
    )
    parser.add_argument(
        "--bundle", type=Path, help="a float bundle of the checkpoint (--device cpu)"
    )
    parser.add_argument(
        "--most-utterances", type=count, default=128, metavar="N", help="at most so many (128)"
    )
    parser.add_argument("--seed", type=count_or_zero, default=0, help="of every choice (default 0)")
    parser.add_argument("--threads", type=count, default=1, help="CPU threads (default 1)")
    parser.add_argument(
        "--pool", metavar="N", help="experts of the float model kept in memory, as for `run`"
    )
    parser.add_argument(
        "--threshold", type=count_or_zero, help="tokens below which an expert is topped up (256)"
    )
    parser.add_argument(
        "--floor", type=count_or_zero, help="routed tokens below which an expert fails the run (32)"
    )
    parser.add_argument(
        "--fit-routers",
        action="store_true",
        help="fit the routers to the float model's choices after the experts are quantised",
    )
    parser.add_argument("--no-gate", action="store_true", help="leave the accuracy gate out")
    parser.add_argument("--json", action="store_true", help="the report as JSON on stdout")
    understanding = parser.add_argument_group(
        "understanding", "what tells the checkpoint's questions from anything else; no table then"
    )
    understanding.add_argument(
        "--understanding",
        action="store_true",
        help="fit it on --utterances (NAME.txt beside NAME.wav); -o is the checkpoint, or a folder",
    )
    understanding.add_argument(
        "--others",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="recordings that are no questions: noise, music, other talk",
    )
    understanding.add_argument(
        "--parts",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="recordings of half questions, besides those that are broken off here",
    )
    understanding.add_argument(
        "--questions", type=Path, metavar="FILE", help="all known questions, one a line"
    )
    understanding.add_argument(
        "--line", type=Path, metavar="WAV", help="what is said when a question is refused"
    )
    understanding.add_argument(
        "--keep-head", action="store_true", help="fit the scores alone, for the word head there is"
    )


def main(args: argparse.Namespace) -> int:
    """Calibrate; returns 1 if the accuracy gate failed. The table then says so, and `export`
    refuses it.

    Raises EdgeError if the checkpoint, the corpus or the place cannot be used, or the corpus does
    not cover the experts.
    """
    if args.understanding:
        return _fit_understanding(args)
    from deeptalk_edge.calibration.table import TABLE_FILES
    from deeptalk_edge.devices.profile import load_profile
    from deeptalk_edge.files import staged_directory

    profile = load_profile(args.device)
    if args.precision:
        profile = profile.with_precision(args.precision)
    corpus = _corpus(args)
    for file, reason in corpus.refused.items():
        log.warning("%s: left out: %s", file, reason)
    with (
        staged_directory(args.output, replaces=TABLE_FILES) as staging,
        tempfile.TemporaryDirectory(prefix="deeptalk-calibrate-") as scratch,
        _float_bundle(args, Path(scratch)) as reference,
    ):
        found = _calibrated(args, profile, corpus, reference, staging, Path(scratch))
        if not args.no_gate:
            found = _gated(args, profile, found, reference, staging, Path(scratch))
        found = _reported(found, staging)
    _say(found, args)
    gate = found.table.calibration.gate
    return 0 if gate is None or gate.passed else 1


def _fit_understanding(args: argparse.Namespace) -> int:
    from deeptalk_edge.calibration.understanding.command import fit_from_recordings, say

    with (
        tempfile.TemporaryDirectory(prefix="deeptalk-calibrate-") as scratch,
        _float_bundle(args, Path(scratch)) as bundle,
    ):
        say(fit_from_recordings(args, bundle), args.output)
    return 0


def _corpus(args: argparse.Namespace) -> Corpus:
    from deeptalk_edge.calibration.corpus import default_corpus, read_corpus
    from deeptalk_edge.calibration.default_voice import spoken_defaults

    if args.utterances:
        return read_corpus(args.utterances, most=args.most_utterances, seed=args.seed)
    log.warning("no --utterances: a few questions made here; a product needs its users' own")
    return default_corpus(spoken_defaults(), most=args.most_utterances, seed=args.seed)


@contextmanager
def _float_bundle(args: argparse.Namespace, scratch: Path) -> Iterator[Bundle]:
    from deeptalk_edge.bundle.reader import Bundle

    if args.bundle is None:
        _export([str(args.checkpoint), "--device", "cpu", "-o", str(scratch / "float")])
    yield Bundle.open(args.bundle or scratch / "float")


def _calibrated(
    args: argparse.Namespace,
    profile: DeviceProfile,
    corpus: Corpus,
    reference: Bundle,
    staging: Path,
    scratch: Path,
) -> Findings:
    """Quantise; fit the routers if that was asked for."""
    from deeptalk_edge.bundle.manifest import Origin
    from deeptalk_edge.calibration.calibrate import calibrate, with_fitted_routers
    from deeptalk_edge.calibration.precision import chosen_forms, forms_within
    from deeptalk_edge.checkpoint.config import read_config
    from deeptalk_edge.checkpoint.expert_split import read_audio_experts
    from deeptalk_edge.checkpoint.hashes import FileHashes
    from deeptalk_edge.checkpoint.reader import Checkpoint

    config = read_config(args.checkpoint)
    checkpoint, audio = Checkpoint.of(config), read_audio_experts(config)
    settings = _settings(args, profile)
    forms: Any = chosen_forms(checkpoint.spec, profile)
    if settings.budget_bytes is not None:
        fixed_bytes = _fixed_bytes(args, checkpoint.spec)
        forms = partial(
            forms_within,
            checkpoint,
            audio,
            fixed_bytes=fixed_bytes,
            budget_bytes=settings.budget_bytes,
            threshold=settings.threshold,
        )
    origin = Origin(
        name=args.checkpoint.resolve().name, sha256=FileHashes().of_weights(args.checkpoint)
    )
    with _bar() as show:
        found = calibrate(
            checkpoint, origin, audio, reference, corpus, profile, forms, staging, settings, show
        )
        if args.fit_routers:
            candidate = _candidate(args, profile, staging, scratch / "unfitted")
            found = with_fitted_routers(
                found, checkpoint, reference, candidate, staging, settings, show
            )
    return found


def _settings(args: argparse.Namespace, profile: DeviceProfile) -> CalibrateSettings:
    from deeptalk_edge.calibration.budget import parse_bytes
    from deeptalk_edge.calibration.calibrate import CalibrateSettings
    from deeptalk_edge.calibration.coverage import FLOOR, THRESHOLD

    method: Method = args.method or ("gptq" if profile.precision.experts == "int4" else "mse")
    return CalibrateSettings(
        method=method,
        threshold=THRESHOLD if args.threshold is None else args.threshold,
        budget_bytes=parse_bytes(args.budget) if args.budget else None,
        floor=FLOOR if args.floor is None else args.floor,
        seed=args.seed,
        threads=args.threads,
        pool=args.pool,
    )


def _candidate(
    args: argparse.Namespace, profile: DeviceProfile, table: Path, place: Path
) -> Bundle:
    """Export what a table describes, for the CPU."""
    from deeptalk_edge.bundle.reader import Bundle

    cache = profile.precision.kv_cache if profile.backend == "cpu" else "bfloat16"
    arguments = ["--device", "cpu-int8", "--precision", f"kv_cache={cache}"]
    _export([str(args.checkpoint), *arguments, "--table", str(table), "-o", str(place)])
    return Bundle.open(place)


def _gated(
    args: argparse.Namespace,
    profile: DeviceProfile,
    found: Findings,
    reference: Bundle,
    staging: Path,
    scratch: Path,
) -> Findings:
    """Export the table, ask the bundle what was held out, and write the gate into the table."""
    from dataclasses import replace

    from deeptalk_edge.calibration.gate import run_gate
    from deeptalk_edge.calibration.table import write_table

    candidate = _candidate(args, profile, staging, scratch / "candidate")
    with _bar() as show:
        gate = run_gate(
            reference,
            candidate,
            found.corpus.held_out,
            profile.gate,
            threads=args.threads,
            seed=args.seed,
            progress=lambda done, total: show("gate", done, total),
        )
    calibration = replace(found.table.calibration, gate=gate)
    table = write_table(replace(found.table, calibration=calibration), staging)
    return replace(found, table=table)


def _reported(found: Findings, staging: Path) -> Findings:
    from dataclasses import replace

    from deeptalk_edge.calibration.calibrate import as_report
    from deeptalk_edge.calibration.corpus import dumps
    from deeptalk_edge.calibration.report_page import report_page
    from deeptalk_edge.calibration.table import REPORT, REPORT_JSON, write_table
    from deeptalk_edge.files import write_file

    content = as_report(found)
    write_file(staging / REPORT_JSON, dumps(content).encode())
    write_file(staging / REPORT, report_page(found, content).encode())
    return replace(found, table=write_table(found.table, staging))


def _fixed_bytes(args: argparse.Namespace, spec: ModelSpec) -> int:
    """Bytes of the bundle beside the routed experts, as the exporter plans them."""
    from deeptalk_edge.bundle.routing import planned_bytes

    flags = [f"--precision={flag}" for flag in args.precision]
    planned = json.loads(
        _export([str(args.checkpoint), "--device", args.device, *flags, "--dry-run", "--json"])
    )
    others = (file["bytes"] for file in planned["files"] if file["name"] != "experts.bin")
    return int(sum(others)) + planned_bytes(spec.decoder)


def _export(arguments: Sequence[str]) -> str:
    """Run `deeptalk-edge export` in a child process; returns what it printed.

    Raises ArtifactError with what it said if it fails.
    """
    from deeptalk_edge.errors import ArtifactError

    command = [sys.executable, "-m", "deeptalk_edge.cli", "export", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().removeprefix("deeptalk-edge: ") or f"code {done.returncode}"
        raise ArtifactError(f"export {' '.join(arguments)} failed: {said}")
    return done.stdout


@contextmanager
def _bar() -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(file=sys.stderr, leave=False, disable=None) as bar:

        def show(step: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description(step)

        yield show


def _say(found: Findings, args: argparse.Namespace) -> None:
    from deeptalk_edge.calibration.calibrate import as_report
    from deeptalk_edge.calibration.corpus import dumps

    content = as_report(found)
    if args.json:
        print(dumps(content), end="")
        return
    calibration = found.table.calibration
    print(f"{args.output}: {calibration.method}, {calibration.experts} experts")
    for layer, entry in content["layers"].items():
        print(
            f"  layer {layer:>3} {entry['precision']:10}{entry['bytes'] / 1e6:9.2f} MB"
            f"  error {entry['mean_error']:.4f}, worst {entry['worst_error']:.4f}"
        )
    print(
        f"  coverage: least {content['coverage']['least_routed']} routed tokens, "
        f"{calibration.forced} experts topped up, {calibration.below_floor} below "
        "the default floor"
    )
    if routers := calibration.routers:
        print(
            f"  routers: {len(routers.layers)} fitted, agreement {routers.trained:.4f} to "
            f"{routers.fitted:.4f}"
        )
    gate = calibration.gate
    if gate is None:
        print("  gate: not run")
        return
    for name, measure in gate.measures.items():
        if measure.value is None:
            print(f"  {name:26} not measured: {measure.reason}")
        elif measure.limit is not None:
            sign = "<=" if measure.most else ">="
            print(f"  {name:26}{measure.value:9.4f} {sign} {measure.limit:g}")
    print(f"  gate: {'passed' if gate.passed else 'FAILED: ' + ', '.join(gate.failed)}")
