"""`python -m deeptalk_edge.training.tiny --out DIR`: the tiny checkpoint, from nothing.

speech     every question in many voices, every answer in one
codes      tokeniser and answer units
then side by side: hearing | codec decoder, speaking
then the remaining stages, two processes sharing each step
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from deeptalk_edge.training.tiny.codec import DecoderSettings
from deeptalk_edge.training.tiny.make import MakePlan, make
from deeptalk_edge.training.tiny.stages import TINY_LOSSES
from deeptalk_edge.training.tiny.train import TrainSettings


def main() -> None:
    """Make everything and say how long it took."""
    arguments, began = _arguments(), time.monotonic()
    out, scale = arguments.out, arguments.steps_scale
    settings = TrainSettings(
        losses=replace(TINY_LOSSES, bfloat16=arguments.bfloat16), seed=arguments.seed
    )
    plan = MakePlan(
        work=arguments.work or out.with_name(out.name + ".work"),
        device=arguments.device,
        settings=settings.scaled(scale),
        codec_steps=max(4, round(DecoderSettings().num_steps * scale)),
        workers=arguments.workers,
    )
    make(plan, out)
    print(f"{out}: {(time.monotonic() - began) / 60:.1f} minutes")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deeptalk_edge.training.tiny", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's directory")
    parser.add_argument("--work", type=Path, help="where parts are kept; default OUT.work")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="cores to use")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps-scale", type=float, default=1.0, help="shorten for a trial")
    parser.add_argument(
        "--bfloat16",
        action=argparse.BooleanOptionalAction,
        default=_has_bfloat16(),
        help="matrix products in bfloat16; by default where the processor supports it",
    )
    return parser.parse_args()


def _has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware, as far as Linux says."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "avx512_bf16" in cpu.read_text(encoding="utf-8")


if __name__ == "__main__":
    main()
