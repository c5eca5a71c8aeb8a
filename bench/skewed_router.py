r"""Calibrates a checkpoint whose routers never choose 11 of 16 experts, here and by other tools.

checkpoint   the tiny one with eight more (audio) experts a layer; five experts a layer keep their
             router rows, the others get rows whose score is below every other's on real inputs
ours         `calibrate` with the default floor, which must fail, and with --floor 0
others       --modelopt PYTHON and --llm-compressor PYTHON: interpreters of environments of their
             own, with that tool and transformers. They quantise the decoder on typed questions

    python -m venv A; A/bin/pip install nvidia-modelopt==0.47.0 transformers accelerate requests
    python -m venv B; B/bin/pip install llmcompressor==0.14.0.1
    python -m deeptalk_edge.bench skewed_router \
        --modelopt A/bin/python --llm-compressor B/bin/python

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.corpus import read_corpus
from deeptalk_edge.calibration.observe import observe
from deeptalk_edge.checkpoint.config import read_config
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.files import write_file
from deeptalk_edge.training.checkpoint import config_of, model_of, save_checkpoint
from deeptalk_edge.training.experts import MixtureOfExperts
from deeptalk_edge.training.moextend import added_experts, with_audio_experts

SEEN = (0, 1, 2, 8, 9)
"""Experts of each layer that the routers still choose: three of text, two of audio."""
NUM_ADDED = 8
_BELOW = 60.0  # what an unseen expert's logit is, about, below zero; the others' are -5 to 5


def write_skewed(tiny: Path, questions: Path, place: Path) -> None:
    """Write the checkpoint; `tiny` stays as it is."""
    config = read_config(tiny)
    model = with_audio_experts(model_of(config), NUM_ADDED)
    decoder = model.spec.decoder
    directions = _common_directions(tiny, questions)
    unseen = [e for e in range(decoder.num_experts) if e not in SEEN]
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in decoder.moe_layers:
            mlp = model.model.layers[layer].mlp
            assert isinstance(mlp, MixtureOfExperts)
            rows = mlp.gate.weight
            rows[unseen] = -_BELOW * torch.from_numpy(directions[layer])
            rows[8:10] += 0.1 * torch.randn(rows[8:10].shape)  # copies of 0 and 1 tie otherwise
    fields = {**config_of(model.spec), "audio_experts_file": "audio_experts.json"}
    save_checkpoint(place, model, fields)
    audio = added_experts(decoder, NUM_ADDED)
    write_file(place / "audio_experts.json", json.dumps(audio).encode())
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copyfile(tiny / name, place / name)
    shutil.copytree(tiny / "snac", place / "snac")


def _common_directions(tiny: Path, questions: Path) -> dict[int, NDArray[np.float32]]:
    """By layer u (C,) with u x near 1 for every input x (C,) of its experts: least squares."""
    corpus = read_corpus([questions], most=24)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        export_bundle(tiny, Path(scratch) / "float", ExportSettings())
        seen = observe(Bundle.open(Path(scratch) / "float"), corpus.measured, Path(scratch))
        for layer, tokens in seen.tokens.items():
            x = np.asarray(tokens.x, np.float64)
            ridge = x.T @ x + 1e-3 * len(x) * np.eye(x.shape[1])
            found[layer] = np.linalg.solve(ridge, x.sum(axis=0)).astype(np.float32)
    return found


def calibrated(checkpoint: Path, questions: Path, table: Path, *flags: str) -> tuple[int, str]:
    """Run `calibrate`; returns its exit status and what it said."""
    command = [sys.executable, "-m", "deeptalk_edge.cli", "calibrate", str(checkpoint)]
    command += ["--utterances", str(questions), "--precision", "experts=int4:32", "--no-gate"]
    done = subprocess.run(
        [*command, "-o", str(table), *flags], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def ours(checkpoint: Path, questions: Path, work: Path) -> dict[str, Any]:
    """What `calibrate` does."""
    status, said = calibrated(checkpoint, questions, work / "refused")
    topped_up, _ = calibrated(checkpoint, questions, work / "table", "--floor", "0")
    if topped_up:
        raise SystemExit("calibrate --floor 0 failed")
    report = json.loads((work / "table" / "report.json").read_text())
    tokens = report["tokens"].values()
    return {
        "default_floor_status": status,
        "default_floor_says": said.strip().splitlines()[-1],
        "experts": len(tokens),
        "unseen": sum(each["routed_all"] == 0 for each in tokens),
        "topped_up": sum(each["routed_all"] == 0 and each["forced"] > 0 for each in tokens),
        "worst_error": max(layer["worst_error"] for layer in report["layers"].values()),
    }


def theirs(python: Path, script: str, checkpoint: Path, questions: Path) -> dict[str, Any]:
    """Run a peer's script in its own environment; returns its JSON."""
    program = Path(__file__).parent / "peers" / script
    texts = [path.read_text().splitlines()[0] for path in sorted(questions.glob("*.txt"))]
    done = subprocess.run(
        [str(python), str(program), str(checkpoint)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{program.name} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    words = ("no token", "not calibrated", "uncalibrated", "unused expert", "never routed")
    said = [line for line in done.stderr.splitlines() if any(w in line.lower() for w in words)]
    return {**found, "warnings_of_experts": said}


def main(argv: Sequence[str] | None = None) -> int:
    """Print what each tool did with the experts that no token reached."""
    parser = argparse.ArgumentParser(prog="bench skewed_router", description=__doc__)
    parser.add_argument("--tiny", type=Path, default=Path("checkpoints/tiny"))
    parser.add_argument("--work", type=Path, default=Path("build/skewed_router"))
    parser.add_argument("--modelopt", type=Path, metavar="PYTHON")
    parser.add_argument("--llm-compressor", type=Path, metavar="PYTHON")
    args = parser.parse_args(argv)
    shutil.rmtree(args.work, ignore_errors=True)
    args.work.mkdir(parents=True)
    checkpoint, questions = args.work / "checkpoint", args.tiny / "questions"
    write_skewed(args.tiny, questions, checkpoint)
    found: dict[str, Mapping[str, Any]] = {"ours": ours(checkpoint, questions, args.work)}
    for name, python, script in (
        ("modelopt", args.modelopt, "modelopt_moe.py"),
        ("llm-compressor", args.llm_compressor, "llm_compressor_moe.py"),
    ):
        if python is not None:
            found[name] = theirs(python, script, checkpoint, questions)
    for tool, said in found.items():
        print(tool)
        for key, value in said.items():
            print(f"  {key}: {value}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
