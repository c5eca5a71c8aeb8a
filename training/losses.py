"""The training losses of DeepTalk.

token losses   one cross-entropy for each stream of the grid, each a mean over its own labelled rows
balance        DeepSeek's auxiliary loss: it pulls every sequence's routing towards equal shares
distillation   KL divergence of the text from a parent model's, for rows without speech
preference     DPO, one term for each codebook

Source: DeepTalk `deeptalk.py: forward`, `deeptalk_rl.py`; DeepSeek-V2 (arXiv 2405.04434), section
2.2.3 and `MoEGate`; DPO (arXiv 2305.18290), equation 7.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from deeptalk_edge.training.experts import Routing

Losses = Mapping[str, Tensor]
"""Scalars by name; their sum is what a step descends."""

IGNORE = -100
"""The label of what is not predicted: prompts, padding, a codebook before its first frame."""

OFFICIAL_WEIGHTS = (1.0,) * 8


def token_losses(
    text_logits: Tensor,
    code_logits: Tensor,
    targets: Tensor,
    weights: Sequence[float] = OFFICIAL_WEIGHTS,
) -> dict[str, Tensor]:
    """Each stream's share of a batch's loss; their sum is what the official trainer descends.

    `text_logits` (N, V_text) and `code_logits` (N, K, V_code) belong to rows of which `targets`
    (N, K + 1) says what the next row holds: K un-shifted codes, then a text id. `weights` are the
    text's, then each codebook's.

    The official loss is a mean over terms: the text, the codebooks unless nothing of them is
    labelled, and the turn state, which the official code multiplies by 0 and still counts, up to
    the number of weights. So with eight weights a batch without speech is divided by 2, one with
    speech by 8. A batch in which no text is labelled has no official meaning; its text term is 0.
    """
    terms = {"text": _cross_entropy(text_logits, targets[:, -1])}
    codes = targets[:, :-1]
    for i in range(codes.shape[1]):
        if bool((codes[:, i] != IGNORE).any()):
            terms[f"code{i}"] = _cross_entropy(code_logits[:, i], codes[:, i])
    num_terms = min(len(terms) + 1, len(weights))
    return {
        name: term * (weight / num_terms)
        for (name, term), weight in zip(terms.items(), weights, strict=False)
    }


def balance_loss(routing: Sequence[Routing], live: Tensor, weight: float) -> Tensor:
    """The auxiliary loss of all MoE layers: `weight` * mean over sequences of sum(share * mass).

    Share is how often an expert was picked over the S live rows of a sequence, times
    E / (S * top_k); mass is the mean of its probability over them. `live` (B, T) leaves padding
    out, which the official code counts.
    """
    lengths = live.sum(dim=1, keepdim=True).clamp(min=1).float()  # (B, 1)
    total = torch.zeros((), device=live.device)
    for layer in routing:
        num_experts, top_k = layer.probabilities.shape[-1], layer.expert_ids.shape[-1]
        picks = layer.expert_ids.flatten(1)  # (B, T * top_k)
        counted = live.repeat_interleave(top_k, dim=1).float()
        shares = torch.zeros(len(picks), num_experts, device=picks.device)
        shares = shares.scatter_add(1, picks, counted) * num_experts / (lengths * top_k)
        mass = (layer.probabilities * live[..., None]).sum(dim=1) / lengths
        total = total + (shares * mass).sum(dim=1).mean()
    return weight * total


def added(parts: Iterable[Losses]) -> dict[str, Tensor]:
    """Losses of several batches, added up by name."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, loss in part.items():
            total[name] = total[name] + loss if name in total else loss
    return total


def distillation_loss(logits: Tensor, parent_logits: Tensor) -> Tensor:
    """KL(parent || model), a mean over N rows; both (N, V)."""
    return F.kl_div(
        logits.float().log_softmax(-1),
        parent_logits.float().log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )


def code_log_probabilities(code_logits: Tensor, targets: Tensor) -> Tensor:
    """Summed log-probability of each sequence's codes, one for each codebook: (B, K).

    `code_logits` (B, T, K, V_code), un-shifted `targets` (B, T, K); IGNORE counts nothing.
    """
    asked = targets != IGNORE
    chosen = code_logits.float().log_softmax(-1)
    picked = chosen.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (picked * asked).sum(dim=1)


def preference_losses(
    win: Tensor, lose: Tensor, reference_win: Tensor, reference_lose: Tensor, beta: float
) -> Tensor:
    """DPO of each codebook, a mean over the batch: -log sigmoid(beta * margin), (K,).

    All four are summed log-probabilities (B, K). There is no length normalisation, as released.
    """
    margin = (win - lose) - (reference_win - reference_lose)
    return -F.logsigmoid(beta * margin).mean(dim=0)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 over the labelled rows; 0 where there are none."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)
