"""Trains a checkpoint whose experts are wide enough for int4 groups of 64 and 128.

    python -m deeptalk_edge.bench wide_checkpoint --work build/wide --out build/wide/checkpoint
    python -m deeptalk_edge.bench calibration --typed --work build/wide \\
        --checkpoint build/wide/checkpoint --forms int4:128 int4:64

The decoder is 256 wide with experts of 256 x 128. It is trained on typed questions only, by the
speaking stage of `make tiny`, with the codec of the shipped checkpoint; its encoder is random, so
it answers nothing that is spoken. 2,500 steps by default.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from deeptalk_edge.training.data.codes import CODEC_ENCODER
from deeptalk_edge.training.tiny.corpus import Corpus, load_corpus, synthesise
from deeptalk_edge.training.tiny.publish import publish
from deeptalk_edge.training.tiny.shape import DECODER
from deeptalk_edge.training.tiny.stages import TINY_LOSSES
from deeptalk_edge.training.tiny.tokens import TINY_CODEC, Tokeniser
from deeptalk_edge.training.tiny.train import TrainSettings, Workshop, learn_to_speak
from deeptalk_edge.training.tiny.units import UnitVoice, build_units

WIDE = replace(DECODER, width=256, expert_ffn_width=128)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and write the checkpoint."""
    parser = argparse.ArgumentParser(prog="bench wide_checkpoint", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/wide"))
    parser.add_argument("--out", type=Path, default=Path("build/wide/checkpoint"))
    parser.add_argument("--tiny", type=Path, default=Path("checkpoints/tiny"))
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    began = time.monotonic()
    corpus, units = typed_course(args.work, args.tiny, workers=args.threads)
    settings = TrainSettings(losses=replace(TINY_LOSSES, bfloat16=True), speaking_steps=args.steps)
    workshop = Workshop(corpus, units, TINY_CODEC, settings, "cpu", WIDE)
    trained = learn_to_speak(workshop, args.work, final_rate=0.02)
    model = workshop.new_model()
    model.load_state_dict(load_file(trained), strict=False)
    no_split: list[list[int]] = [[] for _ in WIDE.moe_layers]
    encoder = args.tiny / CODEC_ENCODER
    publish(model, workshop.tokenizer, no_split, args.tiny / "snac", encoder, args.out)
    print(f"{args.out}: {(time.monotonic() - began) / 60:.1f} minutes")
    return 0


def typed_course(work: Path, tiny: Path, *, workers: int) -> tuple[Corpus, UnitVoice]:
    """The corpus of `make tiny`, and the answer voice in codes of the shipped codec; made in `work`
    if they are missing."""
    if not (work / "corpus" / "corpus.json").exists():
        synthesise(work / "corpus", seed=0, workers=workers)
    units = work / "units.npz"
    if not units.exists():
        build_units(Tokeniser.load(tiny / CODEC_ENCODER)).save(units)
    return load_corpus(work / "corpus"), UnitVoice.load(units)


if __name__ == "__main__":
    sys.exit(main())
