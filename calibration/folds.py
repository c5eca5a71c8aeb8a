"""Channel scales folded into a checkpoint, the same function in floats, and fitted routers.

    experts' inputs   norm / s, then router, shared and routed gate and up  * s      s (C,) a layer
    hidden values     up rows / t, then down columns * t                  t (G,) an expert
    latent cache      kv_a_layernorm / r, then kv_b_proj columns * r         r (latent,) a layer
    routers           replaced by those of routers.py                        (E, C) a layer

A `FoldedCheckpoint` hands out the changed tensors by their official names, so the exporter needs to
know nothing of it: graphs, records, routers and references all follow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.checkpoint.reader import Checkpoint, CodecCheckpoint
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import DecoderSpec

Array = NDArray[np.float32]

_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")
_INPUTS = {"mlp.gate"} | {f"mlp.shared_experts.{part}_proj" for part in ("gate", "up")}


def fold_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shape of one layer's array, by the field of `Folds`."""
    return {
        "inputs": (spec.width,),
        "hidden": (spec.num_experts, spec.expert_ffn_width),
        "latents": (spec.latent_dim,),
        "routers": (spec.num_experts, spec.width),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Folds:
    """Scales by layer; a layer that is missing is not scaled."""

    inputs: Mapping[int, Array] = field(default_factory=dict)
    """(C,) of the experts' inputs; MoE layers only."""
    hidden: Mapping[int, Array] = field(default_factory=dict)
    """(E, G) of the routed experts' hidden values."""
    latents: Mapping[int, Array] = field(default_factory=dict)
    """(latent,) of the cache."""
    routers: Mapping[int, Array] = field(default_factory=dict)
    """(E, C), instead of the checkpoint's; the scales of the inputs come on top."""

    def check(self, spec: DecoderSpec) -> None:
        """Raises ArtifactError if an array has another shape or is not finite, or a scale is not
        above zero."""
        for name, shape in fold_shapes(spec).items():
            layers = range(spec.num_layers) if name == "latents" else spec.moe_layers
            for layer, scales in getattr(self, name).items():
                where = f"folded {name} of layer {layer}"
                if layer not in layers or scales.shape != shape or scales.dtype != np.float32:
                    raise ArtifactError(f"{where}: {scales.dtype} {scales.shape}, expected {shape}")
                least, words = (-np.inf, "") if name == "routers" else (0, " above zero")
                if not (np.isfinite(scales).all() and (scales > least).all()):
                    raise ArtifactError(f"{where}: expected finite numbers{words}")

    @property
    def is_empty(self) -> bool:
        return not (self.inputs or self.hidden or self.latents or self.routers)


class FoldedCheckpoint(Checkpoint):
    """A checkpoint with folded scales. It shares the other's open files."""

    def __init__(self, checkpoint: Checkpoint, folds: Folds) -> None:
        """Raises ArtifactError if the scales do not fit the model."""
        folds.check(checkpoint.spec.decoder)
        self.spec = checkpoint.spec
        self._base, self._folds = checkpoint, folds

    @property
    def codec(self) -> CodecCheckpoint:
        return self._base.codec

    def tensor(self, name: str) -> Array:
        weight = self._base.tensor(name)
        found = _NAME.fullmatch(name)
        if found is None:
            return weight
        return self._folded(int(found[1]), found[2], weight)

    def _folded(self, layer: int, name: str, weight: Array) -> Array:
        folds = self._folds
        if name == "post_attention_layernorm" and layer in folds.inputs:
            return np.asarray(weight / folds.inputs[layer], np.float32)
        if name == "mlp.gate":
            weight = folds.routers.get(layer, weight)
        if name in _INPUTS and layer in folds.inputs:
            return weight * folds.inputs[layer]
        if name == "self_attn.kv_a_layernorm" and layer in folds.latents:
            return np.asarray(weight / folds.latents[layer], np.float32)
        if name == "self_attn.kv_b_proj" and layer in folds.latents:
            return weight * folds.latents[layer]
        if expert := _EXPERT.fullmatch(name):
            return self._folded_expert(layer, int(expert[1]), expert[2], weight)
        return weight

    def _folded_expert(self, layer: int, expert: int, part: str, weight: Array) -> Array:
        hidden = self._folds.hidden.get(layer)
        if part == "down":
            return weight if hidden is None else weight * hidden[expert]
        if part == "up" and hidden is not None:
            weight = weight / hidden[expert][:, None]
        if layer in self._folds.inputs:
            weight = weight * self._folds.inputs[layer]
        return weight
