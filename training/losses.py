"""The training losses of DeepTalk.

token loss   one cross-entropy for each stream of the grid, each a mean over its own labelled
positions
balance      DeepSeek's auxiliary loss: it pulls every sequence's routing towards equal shares

Source: DeepTalk `deeptalk.py: forward`; DeepSeek-V2 (arXiv 2405.04434), section 2.2.3 and
`MoEGate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from deeptalk_edge.training.experts import Routing

IGNORE = -100
"""The label of what nobody predicts: prompts, padding, a codebook before its first frame."""

OFFICIAL_WEIGHTS = (1.0,) * 8


def token_loss(
    text_logits: Tensor,
    code_logits: Tensor,
    targets: Tensor,
    weights: Sequence[float] = OFFICIAL_WEIGHTS,
) -> Tensor:
    """The mean over the terms of a batch, as the official trainer takes it.

    `text_logits` (N, V_text) and `code_logits` (N, K, V_code) belong to rows of which `targets`
    (N, K + 1) says what the next row holds: K un-shifted codes, then a text id. `weights` are the
    text's, then each codebook's.

    Terms are the text, the codebooks unless nothing of them is labelled, and the turn state, which
    the official code multiplies by 0 and still counts, up to the number of weights: with eight
    weights a batch without speech is divided by 2, one with speech by 8. A batch in which no text
    is labelled has no official meaning; its text term is 0.
    """
    terms = [_term(text_logits, targets[:, -1])]
    codes = targets[:, :-1]
    for i in range(codes.shape[1]):
        if bool((codes[:, i] != IGNORE).any()):
            terms.append(_term(code_logits[:, i], codes[:, i]))
    terms.append(text_logits.new_zeros(()))
    kept = [term * weight for term, weight in zip(terms, weights, strict=False)]
    return torch.stack(kept).mean()


def balance_loss(routing: Sequence[Routing], weight: float) -> Tensor:
    """The auxiliary loss of all MoE layers: `weight` * mean over sequences of sum(share * mass).

    Share is how often an expert was picked over S rows, times E / (S * top_k); mass is the mean of
    its probability. Padding rows count, as they do in the official code.
    """
    total = torch.zeros((), device=routing[0].probabilities.device)
    for layer in routing:
        num_experts = layer.probabilities.shape[-1]
        picks = layer.expert_ids.flatten(1)  # (B, S * top_k)
        shares = torch.zeros(len(picks), num_experts, device=picks.device)
        shares.scatter_add_(1, picks, torch.ones_like(picks, dtype=shares.dtype))
        shares = shares * num_experts / picks.shape[1]
        total = total + (shares * layer.probabilities.mean(dim=1)).sum(dim=1).mean()
    return weight * total


def _term(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in float32 over the labelled rows; 0 where there are none."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)
