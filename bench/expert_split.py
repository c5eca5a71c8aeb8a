"""Compares expert splits by hits and by mass: the cost of a split in each modality.

speech   loss of spoken conversations with only the audio experts
text     loss of typed conversations with only the text experts
both     compared with the loss with all experts, and with random splits of the same size

A good split costs both little, because each side has the experts that its modality needs. The model
is fully trained, so the figures show which count is the better guide, not the result of a training
stage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from deeptalk_edge.checkpoint.config import CheckpointConfig, read_config
from deeptalk_edge.training.answering import open_reader
from deeptalk_edge.training.checkpoint import model_of
from deeptalk_edge.training.data.check import sources_of
from deeptalk_edge.training.data.dataset import (
    build_index,
    evaluation_plans,
    load_batch,
    spread,
)
from deeptalk_edge.training.expert_split import random_split, split_experts, text_experts
from deeptalk_edge.training.items import Batch
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.stages.objective import LossSettings, answer_losses, encode_batch
from deeptalk_edge.training.stages.split import counts_of, loads_of

RANDOM_SEEDS = (0, 1, 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each split; the last line is JSON."""
    parser = argparse.ArgumentParser(prog="expert_split", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path, help="conversations, typed and spoken")
    parser.add_argument("--count", default="adaptive")
    parser.add_argument("--max-samples", type=int, default=96)
    args = parser.parse_args(argv)
    config = read_config(args.checkpoint)
    model = model_of(config).eval()
    decoder = model.spec.decoder
    batches = {
        task: _batches(config, f"{task}={args.data}", args.max_samples)
        for task in ("AQACONVA", "TQA")
    }
    both = [f"{task}={args.data}" for task in batches]
    whole = [_loss(model, batches[task], None) for task in batches]
    figures = {"all experts": whole}
    splits = {}
    for by in ("hits", "mass"):
        loads = loads_of(config, both, by=by, max_samples=args.max_samples)
        audio, text = loads.shares()
        counts = counts_of(args.count, audio, text, decoder.top_k)
        splits[by] = split_experts(audio, text, counts, decoder.top_k)
    counts = [len(layer) for layer in splits["hits"]]
    for seed in RANDOM_SEEDS:
        drawn = random_split(len(counts), decoder.num_experts, max(counts), seed)
        splits[f"random {seed}"] = [layer[:n] for layer, n in zip(drawn, counts, strict=True)]
    for name, split in splits.items():
        others = text_experts(split, decoder.num_experts)
        figures[name] = [
            _loss(model, batches["AQACONVA"], others),
            _loss(model, batches["TQA"], split),
        ]
        print(f"{name:12} {split}")
    print(f"{'':12} speech   text")
    for name, (speech, text_loss) in figures.items():
        print(f"{name:12} {speech:.4f}  {text_loss:.4f}")
    print(json.dumps({"splits": splits, "losses": figures}))
    return 0


def _batches(config: CheckpointConfig, source: str, max_samples: int) -> list[Batch]:
    reader = open_reader(config, sources_of([source]))
    entries = build_index(reader).entries
    plans = evaluation_plans(spread(entries, max_samples), 8)
    loaded = [load_batch(reader, plan) for plan in plans]
    return [batch for batch in loaded if isinstance(batch, Batch)]


@torch.inference_mode()
def _loss(
    model: DeepTalk, batches: Sequence[Batch], barred: Sequence[Sequence[int]] | None
) -> float:
    """Mean token loss with some experts barred, with the official trainer's weights of the
    streams."""
    model.set_barred_experts(barred)
    settings = LossSettings(balance=0.0)
    losses = [
        sum(map(float, answer_losses(model, b, encode_batch(model, b), settings).values()))
        for b in batches
    ]
    model.set_barred_experts(None)
    return sum(losses) / len(losses)


if __name__ == "__main__":
    sys.exit(main())
