"""What a recipe works on: its checkpoint and data, read and checked, and what trains."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deeptalk_edge.checkpoint.config import CheckpointConfig, read_config
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.training.checkpoint import model_of
from deeptalk_edge.training.data.dataset import (
    BatchPlan,
    Entry,
    Index,
    Reader,
    build_index,
    evaluation_plans,
    held_out,
)
from deeptalk_edge.training.expert_split import load_split, random_split
from deeptalk_edge.training.lora import adapters, add_adapters
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.moextend import added_experts, with_audio_experts
from deeptalk_edge.training.stages.recipe import Recipe, Source
from deeptalk_edge.training.stages.table import Split, apply_rule, part_of

AUDIO_EXPERTS_FILE = "audio_experts.json"
DEFAULT_SYSTEM = "You are a helpful voice assistant."

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that a run works on."""

    recipe: Recipe
    model: DeepTalk
    reference: DeepTalk | None
    split: Split | None
    reader: Reader
    index: Index
    train_entries: Sequence[Entry]
    evaluation: tuple[Reader, Sequence[BatchPlan]]
    config: Mapping[str, Any]


def prepare(recipe: Recipe) -> Prepared:
    """Read the checkpoint and the data of a recipe, and set what trains. Raises as `run_recipe`."""
    source = Path(recipe.checkpoint)
    encoder = Path(recipe.encoder) if recipe.encoder else None
    read = read_config(source, encoder)
    config, spec = read.content, read.model
    system = recipe.data.system or system_of(read)
    is_preference = recipe.stage == "preference"
    reader = _reader(recipe, recipe.data.train, source, spec, system)
    index = build_index(reader)
    _report_problems(index, recipe.data.bad_share)
    if recipe.data.evaluate:
        judge = _reader(recipe, recipe.data.evaluate, source, spec, system)
        judged = build_index(judge)
        _report_problems(judged, recipe.data.bad_share)
        kept, judged_entries = list(index.entries), list(judged.entries)
    else:
        judge = reader
        kept, judged_entries = held_out(index.entries, recipe.data.held_out)
    model = model_of(read)
    if recipe.stage == "moextend":
        model, config = _extended(recipe, model, config)
    split = _split_of(recipe, model, config, source)
    apply_rule(model, recipe.rule, split)
    if recipe.lora is not None:
        _adapt(model, recipe, split)
    model.checkpoints_gradients = recipe.gradient_checkpointing
    reference = None
    if is_preference or recipe.stage == "distil":
        parent = read_config(Path(recipe.parent), encoder) if recipe.parent else read
        reference = model_of(parent).eval()
        reference.requires_grad_(False)
    return Prepared(
        recipe=recipe,
        model=model,
        reference=reference,
        split=split,
        reader=reader,
        index=index,
        train_entries=kept,
        evaluation=(judge, evaluation_plans(judged_entries, recipe.data.batch_size)),
        config={**config, "audio_experts_file": AUDIO_EXPERTS_FILE} if split else config,
    )


def _reader(
    recipe: Recipe, sources: Sequence[Source], checkpoint: Path, spec: Any, system: str
) -> Reader:
    return Reader(
        checkpoint=checkpoint,
        spec=spec,
        sources=tuple(sources),
        system=system,
        max_rows=recipe.data.max_rows,
        corrupted_codes=recipe.data.corrupted_codes,
        is_preference=recipe.stage == "preference",
    )


def _report_problems(index: Index, bad_share: float) -> None:
    """Bad samples are counted, and refused where they are too many."""
    if not index.problems:
        return
    total = len(index.problems) + len(index.entries)
    said = f"{len(index.problems)} of {total} samples are bad, the first: {index.problems[0]}"
    if len(index.problems) > bad_share * total:
        raise SettingsError(
            f"{said}. `deeptalk-edge train check` names all of them; repair them, or allow that "
            "many with data.bad_share"
        )
    log.warning("%s; they are left out", said)


def _split_of(
    recipe: Recipe, model: DeepTalk, config: Mapping[str, Any], source: Path
) -> Split | None:
    decoder = model.spec.decoder
    if recipe.stage == "random_split":
        count = recipe.num_audio_experts or decoder.num_experts // 4
        return random_split(len(decoder.moe_layers), decoder.num_experts, count, recipe.seed)
    if recipe.stage == "moextend":
        return added_experts(decoder, recipe.num_audio_experts or _quarter(config))
    if recipe.experts:
        return load_split(Path(recipe.experts))
    named = config.get("audio_experts_file")
    path = source / Path(str(named)).name  # released configs name a path on their authors' disk
    return load_split(path) if named and path.is_file() else None


def _extended(
    recipe: Recipe, model: DeepTalk, config: Mapping[str, Any]
) -> tuple[DeepTalk, Mapping[str, Any]]:
    """The model with audio experts beside its own; one that has them keeps them."""
    if config.get("moextend_audio_experts") or "moextend" in str(config.get("model_type")):
        return model, config
    count = recipe.num_audio_experts or model.spec.decoder.num_experts // 4
    extended = with_audio_experts(model, count)
    return extended, {
        **config,
        "n_routed_experts": extended.spec.decoder.num_experts,
        "moextend_audio_experts": count,
    }


def _quarter(config: Mapping[str, Any]) -> int:
    return int(config.get("moextend_audio_experts") or config.get("audio_num_experts") or 0)


def _adapt(model: DeepTalk, recipe: Recipe, split: Split | None) -> None:
    """Adapters on the matrices of the parts that the recipe names; nothing else trains."""
    assert recipe.lora is not None
    torch.manual_seed(recipe.seed)  # a run that resumes starts from the same adapters
    decoder = model.spec.decoder
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and part_of(name, decoder, split) in recipe.lora.parts
    ]
    model.requires_grad_(False)
    count = add_adapters(model, names, rank=recipe.lora.rank, alpha=recipe.lora.alpha)
    if not count:
        raise SettingsError(f"lora.parts = {list(recipe.lora.parts)}: no matrix is part of these")
    for _, layer in adapters(model):
        layer.lora_a.requires_grad_(True)
        layer.lora_b.requires_grad_(True)


def system_of(config: CheckpointConfig) -> str:
    """The system text that a checkpoint was trained with, where it says so."""
    system = config.generation.get("system")
    return system if isinstance(system, str) else DEFAULT_SYSTEM
