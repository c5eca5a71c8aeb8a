"""Experts: a float32 router, the experts it picks for each token, and those that all tokens share.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.2; stage masks: DeepTalk `LUCYDeepseekV2MoE`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deeptalk_edge.model.spec import DecoderSpec

STRETCH = 32
"""An expert runs over a multiple of so many rows, the last of them for nothing: oneDNN compiles a
product for each new shape, which takes four times as long as an expert of the tiny model runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Where one layer sent the tokens of a batch."""

    layer: int
    """Index of the layer in the decoder, dense layers counted."""

    probabilities: Tensor
    """(B, T, E), float32, 0 for barred experts; part of the autograd graph."""

    expert_ids: Tensor
    """(B, T, top_k), int64, in no order."""


class SwiGlu(nn.Module):
    """down(silu(gate x) * up x): the dense MLP, an expert, and all shared experts at once."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, ffn_width, bias=False)
        self.up_proj = nn.Linear(width, ffn_width, bias=False)
        self.down_proj = nn.Linear(ffn_width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class Router(nn.Module):
    """Softmax over all experts, then the greatest `top_k`, weighted as DeepSeek-V2 does."""

    barred: Tensor

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self._spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, spec.width))
        none_barred = torch.zeros(spec.num_experts, dtype=torch.bool)
        self.register_buffer("barred", none_barred, persistent=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden (..., C) to probabilities (..., E), weights (..., top_k) and ids (..., top_k).

        All in float32, under autocast too: a tie broken the other way is another expert.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(hidden.float(), self.weight.float())
            probabilities = logits.masked_fill(self.barred, -torch.inf).softmax(dim=-1)
            weights, ids = probabilities.topk(self._spec.top_k, dim=-1, sorted=False)
            if self._spec.normalises_weights:
                return probabilities, weights / weights.sum(dim=-1, keepdim=True), ids
            return probabilities, weights * self._spec.routed_scale, ids

    def bar(self, expert_ids: Iterable[int]) -> None:
        """Keep every token away from these experts, and let it at all others.

        Raises ValueError if an id is not an expert's or fewer than `top_k` experts are left.
        """
        barred = set(expert_ids)
        num_experts, top_k = self._spec.num_experts, self._spec.top_k
        if not barred <= set(range(num_experts)):
            raise ValueError(f"experts {sorted(barred)}: this model has 0 to {num_experts - 1}")
        if num_experts - len(barred) < top_k:
            raise ValueError(
                f"{len(barred)} of {num_experts} experts barred leaves fewer than top_k = {top_k}"
            )
        self.barred.zero_()
        self.barred[sorted(barred)] = True


class MixtureOfExperts(nn.Module):
    """One layer's router, routed experts and, if it has any, shared experts."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.gate = Router(spec)
        self.experts = nn.ModuleList(
            SwiGlu(spec.width, spec.expert_ffn_width) for _ in range(spec.num_experts)
        )
        self.shared_experts: SwiGlu | None = None
        if spec.num_shared_experts:
            self.shared_experts = SwiGlu(spec.width, spec.shared_ffn_width)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) to (B, T, C), with the probabilities (B, T, E) and ids (B, T, top_k)."""
        probabilities, weights, ids = self.gate(hidden)
        routed = self.routed(hidden.flatten(0, -2), weights.flatten(0, -2), ids.flatten(0, -2))
        out = routed.view_as(hidden)
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden)
        return out, probabilities, ids

    def routed(self, tokens: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The weighted sum (N, C) of the experts of each token; `weights` and `ids` are (N, top_k).

        Tokens are sorted by expert, so that each expert runs once, on one contiguous stretch.
        """
        picks = ids.flatten()
        order = picks.argsort(stable=True)
        sizes = torch.bincount(picks, minlength=len(self.experts)).tolist()
        stretches = torch.split(order // ids.shape[-1], sizes)
        by_expert = torch.cat(
            [
                _run(expert, tokens, chosen)
                for expert, chosen in zip(self.experts, stretches, strict=True)
            ]
        )
        by_token = by_expert.index_select(0, order.argsort()).view(*ids.shape, -1)
        return (by_token * weights[..., None]).sum(dim=1).to(tokens.dtype)


def _run(expert: nn.Module, tokens: Tensor, chosen: Tensor) -> Tensor:
    """An expert over the tokens (n,) of (N, C) that chose it: (n, C)."""
    padded = F.pad(chosen, (0, -len(chosen) % STRETCH))
    out: Tensor = expert(tokens.index_select(0, padded))
    return out[: len(chosen)]
