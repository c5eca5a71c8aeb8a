"""Arenas for tests: a model's experts as records, in shuffled slots among poisoned ones."""

from __future__ import annotations

import numpy as np

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.calibration.quantise import quantise_expert
from deeptalk_edge.export.verify.run_step import Arena
from deeptalk_edge.training.model import DeepTalk

SPARE_SLOTS = 2
POISON = 0xFF  # a NaN in every float


def model_arenas(model: DeepTalk, records: RecordFormat, seed: int = 0) -> dict[int, Arena]:
    """The arena of each MoE layer; every byte outside the records is poison."""
    spec, weights = model.spec.decoder, model.state_dict()
    arenas = {}
    for layer in spec.moe_layers:
        experts = []
        for expert in range(spec.num_experts):
            name = f"model.layers.{layer}.mlp.experts.{expert}"
            gate, up, down = (
                weights[f"{name}.{part}_proj.weight"].numpy() for part in ("gate", "up", "down")
            )
            experts.append((np.concatenate([gate, up]), down))
        arenas[layer] = filled_arena(experts, records, seed + layer)
    return arenas


def filled_arena(
    experts: list[tuple[np.ndarray, np.ndarray]], records: RecordFormat, seed: int
) -> Arena:
    """Experts (gate_up, down) in slots of a random order, each record's padding poisoned."""
    num_slots = len(experts) + SPARE_SLOTS
    slots = np.random.default_rng(seed).permutation(num_slots)[: len(experts)].astype(np.int32)
    arena = np.full((num_slots, records.record_bytes), POISON, np.uint8)
    for slot, (gate_up, down) in zip(slots, experts, strict=True):
        packed = records.pack(quantise_expert(records, gate_up, down))
        for section in records.sections.values():
            arena[slot, section.offset : section.end] = packed[section.offset : section.end]
    return Arena(arena, slots)
