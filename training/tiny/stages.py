"""The decoder's stages of the tiny training; the ear is frozen, and the product's table says what
each of them moves.

align     the whole decoder, its experts not yet told apart
audio     audio experts
text      text experts
joint     the whole decoder
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from deeptalk_edge.files import write_file
from deeptalk_edge.progress import progress
from deeptalk_edge.training.expert_split import ExpertLoads, split_experts
from deeptalk_edge.training.experts import Router, Routing
from deeptalk_edge.training.items import Batch
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.stages.objective import LossSettings, precision, run
from deeptalk_edge.training.stages.table import RULES, Rule, StageName
from deeptalk_edge.training.tiny.hearing import Ear


class Stage(str, Enum):
    """Stages of the decoder."""

    ALIGN = "align"
    AUDIO = "audio"
    TEXT = "text"
    JOINT = "joint"

    @property
    def rule(self) -> Rule:
        """Its row of the product's table. The first stage moves the whole decoder, as the joint
        one does: a decoder that begins from nothing has nothing to be aligned with."""
        return RULES[_RULES[self]]


_RULES: dict[Stage, StageName] = {
    Stage.ALIGN: "joint",
    Stage.AUDIO: "audio_experts",
    Stage.TEXT: "text_experts",
    Stage.JOINT: "joint",
}

TINY_LOSSES = LossSettings(weights=(12.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0), balance=0.01)
"""Text and the slowest codebook decide what is said, and from nothing they need the push."""


@dataclass(frozen=True, slots=True)
class HeardMemory:
    """What the frozen ear made of the training questions, each heard once in a whole window."""

    features: Tensor
    """(N, C) float16, all utterances end to end."""

    spans: dict[int, tuple[int, int]]
    """Utterance to its first frame and their number."""

    def save(self, path: Path) -> None:
        """Write it to a safetensors file."""
        spans = torch.tensor([(key, *span) for key, span in self.spans.items()])
        write_file(path, save({"features": self.features.cpu(), "spans": spans}))

    @classmethod
    def load(cls, path: Path, device: str) -> HeardMemory:
        """Read what `save` wrote."""
        tensors = load_file(path)
        spans = {key: (first, count) for key, first, count in tensors["spans"].tolist()}
        return cls(tensors["features"].to(device), spans)


@torch.no_grad()
def remember(
    model: DeepTalk,
    ear: Ear,
    utterances: npt.NDArray[np.int64],
    *,
    strength: float,
    bfloat16: bool,
    seed: int,
    batch_size: int = 16,
) -> HeardMemory:
    """Encode every utterance once, varied by `strength`, with all the silence that there can be
    around it: the batches cut some of it away, each time another part."""
    rng = np.random.default_rng(seed)
    window, features = 2 * model.spec.encoder.max_frames, []
    spans: dict[int, tuple[int, int]] = {}
    first = 0
    starts = range(0, len(utterances), batch_size)
    for start in progress(starts, name="remember", unit="batch"):
        chosen = utterances[start : start + batch_size]
        takes = ear.plan(chosen, rng, strength, full_margins=True)
        with precision(ear.device, bfloat16):
            encoded = model.encode(ear.hear(takes, window, rng)).half()
        for i, utterance in enumerate(takes.utterances.tolist()):
            count = int(takes.num_frames[i])
            spans[utterance] = (first, count)
            features.append(encoded[i, :count].clone())
            first += count
    return HeardMemory(torch.cat(features), spans)


@torch.no_grad()
def choose_audio_experts(
    model: DeepTalk, batches: Iterable[Batch], memory: HeardMemory, counts: Sequence[int]
) -> list[list[int]]:
    """Split the experts of an aligned model by where it sends sound and text."""
    decoder = model.spec.decoder
    loads = ExpertLoads(len(decoder.moe_layers), decoder.num_experts)
    for batch in batches:
        routing: list[Routing] = []
        run(model, batch, memory.features, routing)
        audio = batch.speech_rows(model.spec.vocabulary)
        loads.count(routing, audio & batch.live, ~audio & batch.live)
    audio_loads, text_loads = loads.shares()
    return split_experts(audio_loads, text_loads, counts, decoder.top_k)


@torch.no_grad()
def start_decoder(model: DeepTalk) -> None:
    """Begin with matrices that keep a vector's size; DeepSeek's initial 0.02 suits a width of
    2048, and at 192 it takes three times as many steps to the same loss."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=0.05)
    nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
