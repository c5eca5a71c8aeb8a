"""Which experts become the audio experts: phase 2 of DeepTalk, after alignment.

load    share of an expert in the routed picks of one modality: hits / (tokens * top_k); or the
        share of the probability that it gets, `mass`
score   load_audio * (1 - load_text): much used by audio and little by text
split   per MoE layer the experts of the highest scores; all others stay text experts
k       the same for every layer, or adaptive: as many as audio uses more than text does,
        load_audio > load_text, within what top_k needs on both sides

The score is the paper's; neither it nor its code says how loads are counted, nor what k is. Audio
positions are rows that carry speech, heard or spoken; the others are text positions.

Source: DeepTalk (arXiv 2506.21864), adaptive modality expert selection; `audio_experts_file`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.files import write_file
from deeptalk_edge.schema import read_json_value
from deeptalk_edge.training.experts import Routing

LoadBy: TypeAlias = Literal["hits", "mass"]
MODALITIES = ("text", "audio")


class ExpertLoads:
    """Counts where the tokens of both modalities went; one per calibration run."""

    def __init__(self, num_layers: int, num_experts: int, by: LoadBy = "hits") -> None:
        self._by = by
        self._loads = torch.zeros(2, num_layers, num_experts, dtype=torch.float64)

    def count(self, routing: Sequence[Routing], audio: Tensor, text: Tensor) -> None:
        """Take one batch: its routing, MoE layers in order, and the masks (B, T) of both
        modalities."""
        for modality, mask in enumerate((text, audio)):
            for i, layer in enumerate(routing):
                if self._by == "mass":
                    probabilities = layer.probabilities[mask].double()
                    self._loads[modality, i] += probabilities.sum(dim=0).cpu()
                else:
                    picks = layer.expert_ids[mask].flatten().cpu()
                    self._loads[modality, i] += torch.bincount(
                        picks, minlength=self._loads.shape[2]
                    )

    def shares(self) -> tuple[Tensor, Tensor]:
        """The loads (L, E) of audio and of text; the rows of each sum to 1.

        Raises ValueError if one of the two was never counted.
        """
        shares = self.shares_by_modality()
        if len(shares) < 2:
            raise ValueError("one modality has no position in the calibration batches; add some")
        return shares["audio"], shares["text"]

    def shares_by_modality(self) -> dict[str, Tensor]:
        """The loads (L, E) of each modality that was counted."""
        totals = self._loads.sum(dim=2, keepdim=True)
        return {
            name: (self._loads[i] / totals[i]).float()
            for i, name in enumerate(MODALITIES)
            if bool((totals[i] > 0).all())
        }


def scores_of(audio_loads: Tensor, text_loads: Tensor) -> Tensor:
    """How much an expert is audio's, (L, E). Source: DeepTalk, Algorithm 1."""
    return audio_loads * (1 - text_loads)


def split_experts(
    audio_loads: Tensor, text_loads: Tensor, counts: Sequence[int], top_k: int
) -> list[list[int]]:
    """The audio experts of every MoE layer, `counts` of them, ascending.

    Loads are (L, E). Raises ValueError if a layer would keep fewer than `top_k` experts of a kind.
    """
    num_layers, num_experts = audio_loads.shape
    if len(counts) != num_layers:
        raise ValueError(f"{len(counts)} counts of audio experts for {num_layers} MoE layers")
    for count in counts:
        if not top_k <= count <= num_experts - top_k:
            raise ValueError(
                f"{count} audio experts of {num_experts}: both kinds need at least top_k = {top_k}"
            )
    order = scores_of(audio_loads, text_loads).argsort(dim=1, descending=True, stable=True)
    return [sorted(row[:n]) for row, n in zip(order.tolist(), counts, strict=True)]


def adaptive_counts(audio_loads: Tensor, text_loads: Tensor, top_k: int) -> list[int]:
    """How many audio experts each layer gets: those that audio uses more than text does, at least
    `top_k` of both kinds."""
    num_experts = audio_loads.shape[1]
    wanted = (audio_loads > text_loads).sum(dim=1).tolist()
    return [min(max(count, top_k), num_experts - top_k) for count in wanted]


def random_split(num_layers: int, num_experts: int, count: int, seed: int) -> list[list[int]]:
    """The baseline: audio experts drawn without looking."""
    draw = random.Random(seed)
    return [sorted(draw.sample(range(num_experts), count)) for _ in range(num_layers)]


def text_experts(audio_experts: Sequence[Sequence[int]], num_experts: int) -> list[list[int]]:
    """The other side of the split."""
    return [[e for e in range(num_experts) if e not in set(layer)] for layer in audio_experts]


def save_split(audio_experts: Sequence[Sequence[int]], path: Path) -> None:
    """Write the list of lists that the config's `audio_experts_file` names."""
    write_file(path, json.dumps([list(layer) for layer in audio_experts]).encode())


def load_split(path: Path) -> list[list[int]]:
    """Read what `save_split` wrote. Raises SettingsError if it is no list of lists of experts."""
    content = read_json_value(path)
    if not isinstance(content, list) or not all(
        isinstance(layer, list) and all(type(expert) is int and expert >= 0 for expert in layer)
        for layer in content
    ):
        raise SettingsError(f"{path}: expected a list of lists of expert numbers, one a MoE layer")
    return content
