"""The decoder's stages of the tiny training, and what each of them moves; the ear is frozen.

align     the whole decoder, its experts not yet told apart
audio     audio experts; text experts are barred, attention above the dense layers stands still
text      text experts, the audio experts barred, likewise
joint     the whole decoder

Source: DeepTalk `train_deeptalk.py`; there the decoder begins as a trained language model, here
from nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from deeptalk_edge.files import write_file
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.training.expert_split import ExpertLoads, split_experts, text_experts
from deeptalk_edge.training.experts import Router, Routing
from deeptalk_edge.training.loop import Losses
from deeptalk_edge.training.losses import IGNORE, balance_loss, token_loss
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.tiny.dataset import NO_FRAME, Batch
from deeptalk_edge.training.tiny.hearing import Ear


class Stage(str, Enum):
    """Stages of the decoder."""

    ALIGN = "align"
    AUDIO = "audio"
    TEXT = "text"
    JOINT = "joint"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What a step descends."""

    weights: tuple[float, ...] = (12.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    """Of the text, then of each codebook; the official trainer has eight ones. Text and the slowest
    codebook decide what is said, and from nothing they need the push."""

    balance: float = 0.01
    bfloat16: bool = False
    """Matrix products in bfloat16: half the time where the processor can."""


def prepare(model: DeepTalk, stage: Stage, audio_experts: Sequence[Sequence[int]]) -> None:
    """Set what `stage` trains and where its tokens may go."""
    model.requires_grad_(True)
    model.model.audio_encoder.requires_grad_(False)
    model.model.audio_mm_projector.requires_grad_(False)
    decoder = model.spec.decoder
    if stage is Stage.AUDIO:
        model.set_frozen_experts(text_experts(audio_experts, decoder.num_experts))
    elif stage is Stage.TEXT:
        model.set_frozen_experts(audio_experts)
    else:
        model.set_frozen_experts(None)
        return
    for i in decoder.moe_layers:
        model.model.layers[i].self_attn.requires_grad_(False)


def answer_losses(
    model: DeepTalk, batch: Batch, memory: HeardMemory | None, settings: LossSettings
) -> Losses:
    """The losses of one batch of conversations; heads are computed where something is asked."""
    routing: list[Routing] = []
    with precision(batch.rows.device, settings.bfloat16):
        hidden = _hidden(model, batch, memory, routing)
        asked = (batch.targets != IGNORE).any(dim=-1)
        said, targets = hidden[asked], batch.targets[asked]
        text_logits, code_logits = model.text_logits(said), model.code_logits(said)
    return {
        "tokens": token_loss(text_logits, code_logits, targets, settings.weights),
        "balance": balance_loss(routing, settings.balance),
    }


def _hidden(
    model: DeepTalk, batch: Batch, memory: HeardMemory | None, routing: list[Routing]
) -> Tensor:
    if memory is None:
        hidden: Tensor = model(batch.rows, routing=routing)
        return hidden
    features = memory.features[batch.frames.clamp(min=0)].float()
    hidden = model(batch.rows, features, batch.frames != NO_FRAME, routing=routing)
    return hidden


def precision(device: torch.device, bfloat16: bool) -> AbstractContextManager[object]:
    """Matrix products in bfloat16, for the forward pass of a step, or all in float32."""
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


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
    for start in tqdm(starts, desc="remember", unit="batch", mininterval=5, disable=None):
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
        _hidden(model, batch, memory, routing)
        audio = speech_rows(batch, model.spec)
        live = (batch.targets != IGNORE).flip(1).any(dim=-1).cumsum(dim=1).flip(1) > 0
        loads.count(routing, audio & live, ~audio & live)
    audio_loads, text_loads = loads.shares()
    return split_experts(audio_loads, text_loads, counts, decoder.top_k)


def speech_rows(batch: Batch, spec: ModelSpec) -> Tensor:
    """Rows (B, T) that carry speech: a heard frame, or a code in any codebook."""
    vocabulary = spec.vocabulary
    local = torch.stack(
        [batch.rows[..., i] - vocabulary.codebook_base(i) for i in range(vocabulary.num_codebooks)]
    )
    return (batch.frames != NO_FRAME) | (local < vocabulary.codebook_size).any(dim=0)


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
