"""What a step descends: the losses of one batch, for every stage.

answers      token losses of each stream and the routers' balance; most stages
distillation the same, and on rows of typed conversations a KL divergence to the text parent
preference   the text's loss and DPO on the codes, against a frozen reference
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from deeptalk_edge.training.experts import Routing
from deeptalk_edge.training.items import NO_FRAME, Batch
from deeptalk_edge.training.losses import (
    IGNORE,
    OFFICIAL_WEIGHTS,
    Losses,
    balance_loss,
    code_log_probabilities,
    distillation_loss,
    preference_losses,
    token_losses,
)
from deeptalk_edge.training.model import DeepTalk

PreferenceMode: TypeAlias = Literal["proper", "released"]

# Norms keep float32 weights under autocast; torch says once that it has no fused kernel for that.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """How the terms weigh."""

    weights: tuple[float, ...] = OFFICIAL_WEIGHTS
    """Of the text, then of each codebook."""

    balance: float = 0.001
    """Of the routers' auxiliary loss; DeepSeek-V2-Lite's `aux_loss_alpha`."""

    distillation: float = 0.0
    """Of the KL divergence to the text parent."""

    bfloat16: bool = False
    """Matrix products in bfloat16: half the time where the processor can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceBatch:
    """Pairs of answers to the same prompts: the better ones, and the worse ones."""

    win: Batch
    lose: Batch

    @property
    def names(self) -> tuple[str, ...]:
        return self.win.names


def answer_losses(
    model: DeepTalk,
    batch: Batch,
    features: Tensor | None,
    settings: LossSettings,
    *,
    parent: DeepTalk | None = None,
) -> Losses:
    """The losses of one batch of conversations; heads are computed where something is asked.

    `features` (N, C) is the table that `batch.frames` indexes, None where nothing is heard. With a
    `parent` its text is imitated, on rows of conversations that are typed and answered in text.
    """
    routing: list[Routing] = []
    with precision(batch.rows.device, settings.bfloat16):
        hidden = run(model, batch, features, routing)
        asked = (batch.targets != IGNORE).any(dim=-1)
        said, targets = hidden[asked], batch.targets[asked]
        text_logits, code_logits = model.text_logits(said), model.code_logits(said)
    losses = token_losses(text_logits, code_logits, targets, settings.weights)
    losses["balance"] = balance_loss(routing, batch.live, settings.balance)
    if parent is not None:
        losses["distillation"] = settings.distillation * _distillation(
            model, parent, batch, hidden, settings
        )
    return losses


def run(
    model: DeepTalk, batch: Batch, features: Tensor | None, routing: list[Routing] | None = None
) -> Tensor:
    """Hidden states (B, T, C) of a batch."""
    hidden: Tensor
    if features is None:
        hidden = model(batch.rows, routing=routing)
    else:
        heard = features[batch.frames.clamp(min=0)].float()
        hidden = model(batch.rows, heard, batch.frames != NO_FRAME, routing=routing)
    return hidden


def encode_batch(model: DeepTalk, batch: Batch, *, bfloat16: bool = False) -> Tensor | None:
    """The feature table (N, C) of a batch's own log-mels; None where nothing is heard.

    The encoder is run without gradient if neither it nor the projector trains.
    """
    if batch.log_mel is None:
        return None
    ears = (model.model.audio_encoder, model.model.audio_mm_projector)
    trains = any(p.requires_grad for ear in ears for p in ear.parameters())
    with (
        torch.set_grad_enabled(trains and torch.is_grad_enabled()),
        precision(batch.rows.device, bfloat16),
    ):
        return model.encode(batch.log_mel).flatten(0, 1)


def preference_batch_losses(
    model: DeepTalk,
    reference: DeepTalk,
    batch: PreferenceBatch,
    settings: LossSettings,
    *,
    beta: float,
    mode: PreferenceMode,
) -> Losses:
    """The text's loss on the better answers, and DPO on the codes of both.

    proper     each answer is scored under its own history: two forward passes of each model
    released   the worse answer's codes are scored under the better one's history, aligned to the
               end of the answer, from one pass; as the official code does
    """
    routing: list[Routing] = []
    with precision(batch.win.rows.device, settings.bfloat16):
        win_hidden, win, lose = _code_scores(model, batch, mode, settings, routing)
        with torch.no_grad():
            _, reference_win, reference_lose = _code_scores(reference, batch, mode, settings, None)
        asked = batch.win.targets[..., -1] != IGNORE
        text_logits = model.text_logits(win_hidden[asked])
    targets = batch.win.targets[asked].clone()
    targets[:, :-1] = IGNORE
    terms = preference_losses(win, lose, reference_win, reference_lose, beta)
    no_codes = text_logits.new_zeros(len(targets), 0, 1)
    text = token_losses(text_logits, no_codes, targets[:, -1:], settings.weights)["text"]
    # The released mean runs over text, seven codebooks and the state, cut to eight terms.
    num_terms = min(len(terms) + 2, len(settings.weights))
    losses = {"text": text * (2 / num_terms)}
    for i, (term, weight) in enumerate(zip(terms, settings.weights[1:], strict=True)):
        losses[f"code{i}"] = term * (weight / num_terms)
    losses["balance"] = balance_loss(routing, batch.win.live, settings.balance)
    return losses


@torch.no_grad()
def preference_margin(
    model: DeepTalk,
    reference: DeepTalk,
    batches: Iterable[PreferenceBatch],
    settings: LossSettings,
    mode: PreferenceMode,
) -> float:
    """Mean over pairs of (win - lose) minus the reference's, codebooks summed, in nats."""
    margins = []
    for batch in batches:
        with precision(batch.win.rows.device, settings.bfloat16):
            _, win, lose = _code_scores(model, batch, mode, settings, None)
            _, old_win, old_lose = _code_scores(reference, batch, mode, settings, None)
        margins.append(((win - lose) - (old_win - old_lose)).sum(dim=1))
    return float(torch.cat(margins).mean())


def precision(device: torch.device, bfloat16: bool) -> AbstractContextManager[object]:
    """Matrix products in bfloat16, for the forward pass of a step, or all in float32."""
    return torch.autocast(device.type, torch.bfloat16) if bfloat16 else nullcontext()


def _distillation(
    model: DeepTalk, parent: DeepTalk, batch: Batch, hidden: Tensor, settings: LossSettings
) -> Tensor:
    """Over the asked text rows of items that neither hear nor say anything."""
    is_text = ~batch.speech_rows(model.spec.vocabulary).any(dim=1, keepdim=True)
    rows = (batch.targets[..., -1] != IGNORE) & is_text
    if not bool(rows.any()):
        return hidden.sum() * 0
    with torch.no_grad(), precision(batch.rows.device, settings.bfloat16):
        wanted = parent.text_logits(parent(batch.rows)[rows])
    with precision(batch.rows.device, settings.bfloat16):
        found = model.text_logits(hidden[rows])
    return distillation_loss(found, wanted)


def _code_scores(
    model: DeepTalk,
    batch: PreferenceBatch,
    mode: PreferenceMode,
    settings: LossSettings,
    routing: list[Routing] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of the better answers, and the log-probabilities (B, K) of both answers'
    codes."""
    hidden = run(model, batch.win, encode_batch(model, batch.win), routing)
    win = code_log_probabilities(model.code_logits(hidden), batch.win.targets[..., :-1])
    if mode == "released":
        targets = _aligned_to_the_end(batch)
        return hidden, win, code_log_probabilities(model.code_logits(hidden), targets)
    lose_hidden = run(model, batch.lose, encode_batch(model, batch.lose))
    lose = code_log_probabilities(model.code_logits(lose_hidden), batch.lose.targets[..., :-1])
    return hidden, win, lose


def _aligned_to_the_end(batch: PreferenceBatch) -> Tensor:
    """The worse answers' codes (B, T, K), shifted so that both answers end in the same row; what
    would begin before the better answer does is dropped."""
    codes = torch.full_like(batch.win.targets[..., :-1], IGNORE)
    for i in range(len(codes)):
        win, lose = batch.win.targets[i, :, :-1], batch.lose.targets[i, :, :-1]
        rows = (win != IGNORE).any(dim=-1).nonzero()[:, 0]
        lose_rows = (lose != IGNORE).any(dim=-1).nonzero()[:, 0]
        if not len(rows) or not len(lose_rows):
            continue
        first, last = int(rows[0]), int(rows[-1])
        count = min(last - first, int(lose_rows[-1] - lose_rows[0])) + 1
        end = int(lose_rows[-1]) + 1
        codes[i, last + 1 - count : last + 1] = lose[end - count : end]
    return codes
