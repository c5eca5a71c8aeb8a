"""`train plan`: what a recipe needs, before a GPU is rented. Everything here is computed.

weights      float32 masters of what trains, sharded; bf16 of what is frozen
optimiser    AdamW: two float32 values a trained parameter, sharded
gradients    one float32 value a trained parameter, sharded
gathered     the layer at work and the next one, whole, in bf16 (FSDP2 prefetches one)
activations  with checkpointing one hidden state a layer and the inner values of one layer; without,
             the inner values of all
time         6 FLOPs a trained parameter and token, 4 with a frozen one, 2 more with checkpointing

Source: the FLOP count of arXiv 2001.08361, appendix B; activations counted from training/model.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from deeptalk_edge.checkpoint.config import read_model_spec
from deeptalk_edge.checkpoint.reader import expected_tensors
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.training.expert_split import random_split
from deeptalk_edge.training.stages.recipe import Recipe
from deeptalk_edge.training.stages.table import part_of

GB = 1e9
RESERVE_GB = 3.0
"""Of each GPU for CUDA, NCCL and fragments."""

_INT4_BYTES = 4.5 / 8  # a scale of 16 bits for every 32 weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the recipe is to run on."""

    num_gpus: int
    gpu_gb: float
    tflops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Parameters of a model under a recipe."""

    total: int
    trained: int
    experts: int
    """Routed experts that are frozen: what could be stored smaller, or elsewhere."""
    largest_layer: int
    active: int
    """That one token meets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Memory of one GPU in GB, and time."""

    recipe: Recipe
    machine: Machine
    counts: Counts
    weights_gb: float
    optimiser_gb: float
    gradients_gb: float
    gathered_gb: float
    activations_gb: float
    hours: float | None
    int4_gb: float
    offload_gb: float

    @property
    def needed_gb(self) -> float:
        return (
            self.weights_gb
            + self.optimiser_gb
            + self.gradients_gb
            + self.gathered_gb
            + self.activations_gb
            + RESERVE_GB
        )

    @property
    def fits(self) -> bool:
        return self.needed_gb <= self.machine.gpu_gb

    def text(self) -> str:
        """The plan for a reader."""
        counts, machine = self.counts, self.machine
        lines = [
            f"{self.recipe.stage} on {machine.num_gpus} x {machine.gpu_gb:g} GB "
            "(computed, nothing was measured)",
            f"parameters    {counts.total / GB:.3f} B, {counts.trained / GB:.3f} B train, "
            f"{counts.active / GB:.3f} B meet a token",
            f"weights       {self.weights_gb:7.1f} GB a GPU",
            f"gradients     {self.gradients_gb:7.1f}",
            f"optimiser     {self.optimiser_gb:7.1f}",
            f"gathered      {self.gathered_gb:7.1f}",
            f"activations   {self.activations_gb:7.1f}",
            f"reserve       {RESERVE_GB:7.1f}",
            f"together      {self.needed_gb:7.1f} of {machine.gpu_gb:g} GB: "
            + ("fits" if self.fits else "DOES NOT FIT"),
        ]
        if not self.fits:
            lines += self._ways_out()
        if self.hours is not None:
            lines.append(
                f"time          {self.hours:.1f} hours at {machine.tflops:g} TFLOP/s a GPU"
            )
        return "\n".join(lines)

    def _ways_out(self) -> list[str]:
        rest = self.needed_gb - self.weights_gb
        lines = []
        for what, gb in (
            ("frozen experts in int4", self.int4_gb),
            ("frozen experts in host memory, fetched over PCIe", self.offload_gb),
        ):
            verdict = "fits" if gb + rest <= self.machine.gpu_gb else "does not fit either"
            lines.append(f"  with {what}: {gb + rest:.1f} GB, {verdict} (not built here)")
        return [*lines, "  or more GPUs, LoRA (--set lora.rank=8), gradient_checkpointing = true"]


def plan_recipe(
    recipe: Recipe, machine: Machine, *, num_rows: int, num_samples: int | None
) -> TrainingPlan:
    """Work out a recipe's needs from its checkpoint's config; no weight is read.

    Raises SettingsError if the recipe names no checkpoint, ArtifactError if its config is damaged.
    """
    if not recipe.checkpoint:
        raise SettingsError("the recipe names no checkpoint; add --set checkpoint=DIRECTORY")
    spec = read_model_spec(Path(recipe.checkpoint))
    counts = count_parameters(spec, recipe)
    gpus = machine.num_gpus
    frozen = counts.total - counts.trained
    weights = (4 * counts.trained + 2 * frozen) / gpus / GB
    expert_gb = 2 * counts.experts / gpus / GB
    tokens = recipe.data.batch_size * num_rows
    backward = 6 if counts.trained > frozen else 4
    flops = (backward + 2 * recipe.gradient_checkpointing) * counts.active * num_rows
    seconds = None
    if num_samples is not None:
        seconds = flops * num_samples * recipe.optimiser.epochs / (machine.tflops * 1e12 * gpus)
    return TrainingPlan(
        recipe=recipe,
        machine=machine,
        counts=counts,
        weights_gb=weights,
        optimiser_gb=8 * counts.trained / gpus / GB,
        gradients_gb=4 * counts.trained / gpus / GB,
        gathered_gb=2 * 2 * counts.largest_layer / GB if gpus > 1 else 0.0,
        activations_gb=activation_bytes(spec, tokens, recipe.gradient_checkpointing) / GB,
        hours=None if seconds is None else seconds / 3600,
        int4_gb=weights - expert_gb + _INT4_BYTES * counts.experts / gpus / GB,
        offload_gb=weights - expert_gb + 2 * 2 * counts.largest_layer / GB,
    )


def count_parameters(spec: ModelSpec, recipe: Recipe) -> Counts:
    """Count a model's parameters from the shapes of its tensors."""
    decoder = spec.decoder
    quarter = max(decoder.num_experts // 4, 1)
    split = random_split(len(decoder.moe_layers), decoder.num_experts, quarter, 0)
    moving = recipe.rule.trains if recipe.lora is None else frozenset(recipe.lora.parts)
    layers = [0] * decoder.num_layers
    total = trained = experts = frozen_experts = ears = added = 0
    for name, shape in expected_tensors(spec).items():
        size = math.prod(shape)
        moves = part_of(name, decoder, split) in moving
        total += size
        ears += size * name.startswith("model.audio_")
        if name.startswith("model.layers."):
            layers[int(name.split(".")[2])] += size
        is_expert = ".mlp.experts." in name
        experts += size * is_expert
        frozen_experts += size * (is_expert and not (moves and recipe.lora is None))
        if recipe.lora is None:
            trained += size * moves
        elif moves and len(shape) == 2:
            added += recipe.lora.rank * sum(shape)
    return Counts(
        total=total + added,
        trained=trained + added,
        experts=frozen_experts,
        largest_layer=max(layers),
        active=round(total - ears - experts * (1 - decoder.top_k / decoder.num_experts)),
    )


def activation_bytes(spec: ModelSpec, num_tokens: int, is_checkpointed: bool) -> float:
    """Of `num_tokens` rows through the decoder and the head, in bf16; logits in float32."""
    decoder = spec.decoder
    heads = decoder.num_heads * (2 * (decoder.nope_dim + decoder.rope_dim) + 2 * decoder.value_dim)
    ffn = 3 * (decoder.top_k * decoder.expert_ffn_width + decoder.shared_ffn_width)
    inner = 6 * decoder.width + heads + 2 * decoder.cache_width + ffn
    layer = 2 * inner * num_tokens
    kept = 2 * decoder.width * num_tokens
    through = decoder.num_layers * kept + layer if is_checkpointed else decoder.num_layers * layer
    logits = 2 * 4 * spec.vocabulary.size * num_tokens
    return float(through + logits)
