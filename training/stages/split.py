"""`train split`: find the audio experts of an aligned checkpoint, and show why these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from deeptalk_edge.checkpoint.config import CheckpointConfig, read_config
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.files import check_output, write_file
from deeptalk_edge.report.page import page as write_page
from deeptalk_edge.report.page import section
from deeptalk_edge.training.checkpoint import model_of
from deeptalk_edge.training.data.check import sources_of
from deeptalk_edge.training.data.dataset import (
    Reader,
    build_index,
    evaluation_plans,
    load_batch,
    spread,
)
from deeptalk_edge.training.expert_split import (
    ExpertLoads,
    LoadBy,
    adaptive_counts,
    save_split,
    scores_of,
    split_experts,
)
from deeptalk_edge.training.items import Batch
from deeptalk_edge.training.journal import router_facts, router_tables
from deeptalk_edge.training.stages.objective import encode_batch
from deeptalk_edge.training.stages.run import count_loads

BATCH_SIZE = 8


def split_checkpoint(
    checkpoint: Path,
    data: Sequence[str],
    out: Path,
    *,
    count: str,
    by: LoadBy,
    page: Path | None,
    max_samples: int,
) -> str:
    """Write the split's JSON, and a page with the table and the heat map if one is named; returns
    the table as text.

    Raises SettingsError if `count` is no number that fits, or the data has only one modality.
    """
    check_output(out)
    config = read_config(checkpoint)
    loads = loads_of(config, data, by=by, max_samples=max_samples)
    top_k = config.model.decoder.top_k
    try:
        audio, text = loads.shares()
        counts = counts_of(count, audio, text, top_k)
        split = split_experts(audio, text, counts, top_k)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    save_split(split, out)
    if page is not None:
        parts = [
            section("Loads, audio experts starred", *router_tables(router_facts(loads), split))
        ]
        write_file(page, write_page("Audio experts", parts).encode())
    return _table(split, audio, text)


@torch.no_grad()
def loads_of(
    config: CheckpointConfig, data: Sequence[str], *, by: LoadBy, max_samples: int
) -> ExpertLoads:
    """Where a checkpoint sends the rows of some data."""
    spec = config.model
    reader = Reader(
        checkpoint=config.directory,
        spec=spec,
        sources=sources_of(data),
        system="",
        max_rows=spec.decoder.max_positions,
    )
    entries = build_index(reader).entries
    if not entries:
        raise SettingsError("no sample is good; `deeptalk-edge train check` says why")
    model = model_of(config).eval()
    loads = ExpertLoads(len(spec.decoder.moe_layers), spec.decoder.num_experts, by)
    for plan in evaluation_plans(spread(entries, max_samples), BATCH_SIZE):
        batch = load_batch(reader, plan)
        assert isinstance(batch, Batch)
        count_loads(model, batch, encode_batch(model, batch), loads)
    return loads


def counts_of(count: str, audio: Tensor, text: Tensor, top_k: int) -> list[int]:
    """Audio experts of each layer. Raises ValueError if `count` is neither `adaptive` nor a
    number."""
    if count == "adaptive":
        return adaptive_counts(audio, text, top_k)
    if not count.isdigit():
        raise ValueError(f"--count {count}: expected a number, or adaptive")
    return [int(count)] * len(audio)


def _table(split: Sequence[Sequence[int]], audio: Tensor, text: Tensor) -> str:
    lines = ["layer  audio experts  (load audio, load text, score of each)"]
    for i, (experts, scores) in enumerate(zip(split, scores_of(audio, text), strict=True)):
        spelt = "  ".join(
            f"{e} ({audio[i, e]:.3f}, {text[i, e]:.3f}, {scores[e]:.3f})" for e in experts
        )
        lines.append(f"{i:>5}  {spelt}")
    return "\n".join(lines)
