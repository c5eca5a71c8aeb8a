"""Which experts become the audio experts: phase 2 of DeepTalk, after alignment.

load    share of an expert in the routed picks of one modality: hits / (tokens * top_k)
score   load_audio * (1 - load_text): much used by audio and little by text
split   per MoE layer the experts of the highest scores; all others stay text experts

The rule is the paper's; that hits are counted, rather than probability mass summed, is our choice,
as neither the paper nor its code says. Audio positions are rows that carry speech, heard or
spoken; the others of a batch, padding left out, are text positions.

Source: DeepTalk (arXiv 2506.21864), adaptive modality expert selection; `audio_experts_file`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from deeptalk_edge.files import write_file
from deeptalk_edge.training.experts import Routing


class ExpertLoads:
    """Counts where the tokens of both modalities went; one per calibration run."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._hits = torch.zeros(2, num_layers, num_experts, dtype=torch.int64)

    def count(self, routing: Sequence[Routing], audio: Tensor, text: Tensor) -> None:
        """Take one batch: its routing, MoE layers in order, and the masks (B, T) of both
        modalities."""
        for modality, mask in enumerate((text, audio)):
            for i, layer in enumerate(routing):
                picks = layer.expert_ids[mask].flatten().cpu()
                self._hits[modality, i] += torch.bincount(picks, minlength=self._hits.shape[2])

    def shares(self) -> tuple[Tensor, Tensor]:
        """The loads (L, E) of audio and of text; the rows of each sum to 1.

        Raises ValueError if one of the two was never counted.
        """
        totals = self._hits.sum(dim=2, keepdim=True)
        if bool((totals == 0).any()):
            raise ValueError("one modality has no position in the calibration batches; add some")
        text, audio = self._hits / totals
        return audio, text


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
    scores = audio_loads * (1 - text_loads)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return [sorted(row[:n]) for row, n in zip(order.tolist(), counts, strict=True)]


def text_experts(audio_experts: Sequence[Sequence[int]], num_experts: int) -> list[list[int]]:
    """The other side of the split."""
    return [[e for e in range(num_experts) if e not in set(layer)] for layer in audio_experts]


def save_split(audio_experts: Sequence[Sequence[int]], path: Path) -> None:
    """Write the list of lists that the config's `audio_experts_file` names."""
    write_file(path, json.dumps([list(layer) for layer in audio_experts]).encode())
