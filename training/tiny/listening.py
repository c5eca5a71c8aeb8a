"""The hearing stage: encoder and projector learn to name what they hear, and are frozen ever after.

phones   named from a layer half way up: 39 of them, heard in every utterance, alike in all voices
words    named from what the decoder will get

Both by connectionist temporal classification, so nothing needs to be aligned; the heads are thrown
away. Phones are what makes an ear from nothing quick: after 3,600 steps of 32 utterances it named
90 % of the validation questions word for word, without phones 44 %.

Source: arXiv 2102.03216 (intermediate CTC).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.training.encoder import EncoderLayer
from deeptalk_edge.training.losses import Losses
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.stages.objective import precision
from deeptalk_edge.training.tiny.corpus import Corpus
from deeptalk_edge.training.tiny.dataset import UtterancePool
from deeptalk_edge.training.tiny.hearing import Ear

WINDOW_STEP = 32
"""Mel frames: windows come in few lengths, for a product is compiled for each
(`experts.STRETCH`)."""

LOCAL_GAIN = 1.4
"""How sharply a new encoder's heads look at their offset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HearingPlan:
    """The course of the hearing stage. Shares are of its steps."""

    num_steps: int = 6000
    batch_size: int = 32
    phone_layer: int = 2
    """Encoder layers under the phones' head."""

    phone_weight: float = 0.5
    """Of the phones' loss; the words' is 1."""

    easy_until: float = 0.2
    """Clear speech comes first: with the full augmentation from the start, nothing is ever
    learnt."""

    hard_from: float = 0.6
    easy_strength: float = 0.2
    hard_strength: float = 0.8
    whole_from: float = 0.92
    """From here on every window is whole, as on a device."""

    seed: int = 0

    def strength_at(self, step: int) -> float:
        """How much of the augmentation a step uses."""
        progress = step / self.num_steps - self.easy_until
        share = min(1.0, max(0.0, progress / (self.hard_from - self.easy_until)))
        return self.easy_strength + share * (self.hard_strength - self.easy_strength)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What is said in each of Q utterances, in one alphabet; the blank is 0."""

    ids: Tensor
    """All utterances' end to end."""

    counts: Tensor
    """(Q,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HearingBatch:
    """Some of a step's utterances, and what is said in them."""

    log_mel: Tensor
    """(Q, M, 2F); F is the longest utterance's unless the window is whole."""

    num_frames: Tensor
    """(Q,)."""

    words: Labels
    phones: Labels
    share: float
    """How many of the step's utterances these are."""


class Listener(nn.Module):
    """An ear with the two heads that name what it hears."""

    def __init__(self, model: DeepTalk, num_words: int, num_phones: int, plan: HearingPlan) -> None:
        super().__init__()
        self.deeptalk, self._plan = model, plan
        self.word_head = _head(model.spec.decoder.width, num_words)
        self.phone_head = _head(model.spec.encoder.width, num_phones)

    def losses(self, batch: HearingBatch, *, bfloat16: bool) -> Losses:
        """Connectionist temporal classification over each utterance's own frames."""
        with precision(batch.log_mel.device, bfloat16):
            inner, features = encode_window(self.deeptalk, batch.log_mel, self._plan.phone_layer)
            words, phones = self.word_head(features), self.phone_head(inner)
        word_loss = _loss(words, batch.words, batch.num_frames)
        phone_loss = _loss(phones, batch.phones, batch.num_frames)
        return {
            "words": batch.share * word_loss,
            "phones": batch.share * self._plan.phone_weight * phone_loss,
        }


def _head(width: int, num_labels: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_labels + 1))


def _loss(logits: Tensor, labels: Labels, num_frames: Tensor) -> Tensor:
    """Of logits (Q, F, labels + 1)."""
    scores = logits.float().log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(scores, labels.ids, num_frames, labels.counts, zero_infinity=True)


class HearingBatches:
    """Draws utterances for the hearing stage, from (seed, step) alone."""

    def __init__(
        self, corpus: Corpus, pool: UtterancePool, ear: Ear, spec: ModelSpec, plan: HearingPlan
    ) -> None:
        self._corpus, self._pool, self._ear, self._spec = corpus, pool, ear, spec
        self._plan = plan
        self.words = sorted(corpus.phones)
        self.phones = sorted({phone for phones in corpus.phones.values() for phone in phones})

    def parts(self, step: int) -> list[tuple[int, slice]]:
        """What `__call__` takes for a step: all its utterances at once while windows are short;
        whole ones are four times the work, so two processes share it."""
        if step < self._plan.whole_from * self._plan.num_steps:
            return [(step, slice(None))]
        return [(step, slice(0, None, 2)), (step, slice(1, None, 2))]

    def __call__(self, step: int, part: slice) -> HearingBatch:
        """Some of a step's utterances, which are all of like length."""
        plan = self._plan
        rng = np.random.default_rng([plan.seed, step])
        chosen = self._pool.draw(rng, plan.batch_size, pool_of=4)[part]
        rng = np.random.default_rng([plan.seed, step, part.start or 0])
        takes = self._ear.plan(chosen, rng, plan.strength_at(step))
        window = 2 * self._spec.encoder.max_frames
        if step < plan.whole_from * plan.num_steps:
            longest = 2 * int(takes.num_frames.max()) + 2 * int(rng.integers(0, 12))
            window = min(window, longest + -longest % WINDOW_STEP)
        said = [self._corpus.utterances[i].question.split() for i in chosen]
        sounds = [[p for word in words for p in self._corpus.phones[word]] for words in said]
        return HearingBatch(
            log_mel=self._ear.hear(takes, window, rng),
            num_frames=torch.from_numpy(takes.num_frames),
            words=self._labels(said, self.words),
            phones=self._labels(sounds, self.phones),
            share=len(chosen) / plan.batch_size,
        )

    def _labels(self, said: Sequence[Sequence[str]], alphabet: Sequence[str]) -> Labels:
        ids = {label: i + 1 for i, label in enumerate(alphabet)}
        return Labels(
            ids=torch.tensor([ids[x] for line in said for x in line], device=self._ear.device),
            counts=torch.tensor([len(line) for line in said]),
        )


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


def encode_window(model: DeepTalk, log_mel: Tensor, inner_layer: int) -> tuple[Tensor, Tensor]:
    """`DeepTalk.encode` for a window of any size, which a device never has: training in short
    windows costs a third. Also returns the output of `inner_layer` layers: (Q, F, W), and the
    features (Q, F, C)."""
    encoder = model.model.audio_encoder
    waves = F.gelu(encoder.conv1(log_mel))
    hidden = F.gelu(encoder.conv2(waves)).transpose(1, 2)
    hidden = inner = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    for depth, layer in enumerate(encoder.layers, start=1):
        hidden = layer(hidden)
        if depth == inner_layer:
            inner = hidden
    return inner, model.model.audio_mm_projector(encoder.layer_norm(hidden))
