"""The stages of the tiny training, and what each of them moves.

hearing   encoder and projector, by naming the words they hear; frozen ever after
align     the whole decoder, its experts not yet told apart
audio     audio experts; text experts are barred, attention above the dense layers stands still
text      text experts, the audio experts barred, likewise
joint     the whole decoder

Source: DeepTalk `train_deeptalk.py`; there the decoder begins as a trained language model, here
from nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from deeptalk_edge.spec import ModelSpec
from deeptalk_edge.training.encoder import EncoderLayer
from deeptalk_edge.training.expert_split import ExpertLoads, split_experts, text_experts
from deeptalk_edge.training.experts import Router, Routing
from deeptalk_edge.training.loop import Losses
from deeptalk_edge.training.losses import IGNORE, balance_loss, token_loss
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.tiny.corpus import Corpus
from deeptalk_edge.training.tiny.dataset import NO_FRAME, Batch, UtterancePool
from deeptalk_edge.training.tiny.hearing import Ear

LOCAL_GAIN = 1.4
"""How sharply a new encoder's heads look at their offset."""


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
    for start in tqdm(starts, desc="remember", unit="batch", mininterval=5):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class HearingBatch:
    """Utterances, and the words that are said in them."""

    log_mel: Tensor
    """(Q, M, 2F); F is the longest utterance's unless the window is whole."""

    num_frames: Tensor
    """(Q,)."""

    words: Tensor
    """All words one after the other, blank being 0."""

    num_words: Tensor
    """(Q,)."""


class WordHead(nn.Module):
    """The helper that names words from audio features; thrown away after training."""

    def __init__(self, model: DeepTalk, words: Sequence[str]) -> None:
        super().__init__()
        self.deeptalk = model
        self.words = list(words)
        self.norm = nn.LayerNorm(model.spec.decoder.width)
        self.head = nn.Linear(model.spec.decoder.width, len(words) + 1)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Log-mel (Q, M, 2F) of a window of any size to log probabilities (Q, F, words + 1)."""
        frames = encode_window(self.deeptalk, log_mel)
        return self.head(self.norm(frames)).log_softmax(-1)  # type: ignore[no-any-return]

    def losses(self, batch: HearingBatch, *, bfloat16: bool = False) -> Losses:
        """Connectionist temporal classification over each utterance's own frames."""
        with precision(batch.log_mel.device, bfloat16):
            scores = self(batch.log_mel).float().transpose(0, 1)
        loss = F.ctc_loss(
            scores, batch.words, batch.num_frames, batch.num_words, zero_infinity=True
        )
        return {"words": loss}

    def transcribe(self, log_mel: Tensor, num_frames: Tensor) -> list[str]:
        """The likeliest word of every frame, repetitions and blanks dropped."""
        best = self(log_mel).argmax(-1).cpu().numpy()
        heard = []
        for ids, length in zip(best, num_frames.tolist(), strict=True):
            kept = ids[:length]
            changed = np.flatnonzero(np.diff(kept, prepend=0))
            heard.append(" ".join(self.words[i - 1] for i in kept[changed] if i))
        return heard


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


@torch.no_grad()
def start_ear(model: DeepTalk) -> None:
    """Begin where an encoder from nothing learns: sound as loud as the positions, and heads that
    look a fixed way to the left or right of each frame, as a convolution would.

    The sinusoids make that exact: q and k of head h turn the fastest positions against each other
    by its offset, so their product is largest that many frames away.
    """
    encoder, projector = model.model.audio_encoder, model.model.audio_mm_projector
    for module in (*encoder.modules(), *projector.modules()):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Conv1d):
            fan_in = module.in_channels * module.kernel_size[0]
            nn.init.normal_(module.weight, std=(2 / fan_in) ** 0.5)
    encoder.embed_positions.weight.mul_(0.5)
    spec = model.spec.encoder
    half, head_width = spec.width // 2, spec.width // spec.num_heads
    pairs = torch.arange(head_width // 2)
    rates = torch.exp(-math.log(10_000) / (half - 1) * pairs)
    for depth, layer in enumerate(encoder.layers, start=1):
        assert isinstance(layer, EncoderLayer)
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        nn.init.normal_(query, std=0.03)
        nn.init.normal_(key, std=0.03)
        for head in range(spec.num_heads):
            offset = depth * (4 * head - 2 * (spec.num_heads - 1))
            sines = head * head_width + pairs
            cosines = sines + head_width // 2
            turn = (rates * offset).to(query.device)
            query[sines, pairs] += LOCAL_GAIN * turn.cos()
            query[sines, half + pairs] += LOCAL_GAIN * turn.sin()
            query[cosines, half + pairs] += LOCAL_GAIN * turn.cos()
            query[cosines, pairs] -= LOCAL_GAIN * turn.sin()
            key[sines, pairs] += LOCAL_GAIN
            key[cosines, half + pairs] += LOCAL_GAIN


def encode_window(model: DeepTalk, log_mel: Tensor) -> Tensor:
    """`DeepTalk.encode` for a window of any size, which a device never has: training in short
    windows costs a third."""
    encoder = model.model.audio_encoder
    waves = F.gelu(encoder.conv1(log_mel))
    hidden = F.gelu(encoder.conv2(waves)).transpose(1, 2)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    for layer in encoder.layers:
        hidden = layer(hidden)
    features: Tensor = model.model.audio_mm_projector(encoder.layer_norm(hidden))
    return features


@dataclass(frozen=True, slots=True, kw_only=True)
class HearingPlan:
    """The course of the hearing stage. Shares are of its steps."""

    num_steps: int = 3000
    batch_size: int = 32
    easy_until: float = 0.25
    """Clear speech comes first: with the full augmentation from the start, nothing is ever
    learnt."""

    hard_from: float = 0.6
    easy_strength: float = 0.2
    hard_strength: float = 0.6
    whole_from: float = 0.8
    """From here on every window is whole, as on a device."""

    seed: int = 0

    def strength_at(self, step: int) -> float:
        """How much of the augmentation a step uses."""
        progress = step / self.num_steps - self.easy_until
        share = min(1.0, max(0.0, progress / (self.hard_from - self.easy_until)))
        return self.easy_strength + share * (self.hard_strength - self.easy_strength)


class HearingBatches:
    """Draws utterances for the hearing stage, from (seed, step) alone."""

    def __init__(
        self,
        corpus: Corpus,
        pool: UtterancePool,
        ear: Ear,
        words: Sequence[str],
        spec: ModelSpec,
        settings: HearingPlan,
    ) -> None:
        self._corpus, self._pool, self._ear, self._spec = corpus, pool, ear, spec
        self._ids = {word: i + 1 for i, word in enumerate(words)}
        self._settings = settings

    def __call__(self, step: int) -> HearingBatch:
        settings = self._settings
        rng = np.random.default_rng([settings.seed, step])
        chosen = self._pool.draw(rng, settings.batch_size, pool_of=4)
        takes = self._ear.plan(chosen, rng, settings.strength_at(step))
        window = 2 * self._spec.encoder.max_frames
        if step < settings.whole_from * settings.num_steps:
            window = min(window, 2 * int(takes.num_frames.max()) + 2 * int(rng.integers(0, 12)))
        said = [
            [self._ids[word] for word in self._corpus.utterances[i].question.split()]
            for i in chosen
        ]
        device = self._ear.device
        return HearingBatch(
            log_mel=self._ear.hear(takes, window, rng),
            num_frames=torch.from_numpy(takes.num_frames),
            words=torch.tensor([i for ids in said for i in ids], device=device),
            num_words=torch.tensor([len(ids) for ids in said]),
        )
