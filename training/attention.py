"""Latent attention: of a row one latent is kept, from which every head's key and value follow.

`expanded_attention` computes it as it is defined; `absorbed_attention` never builds keys and values
and is what devices decode with. Both read the same cache and give the same heads.

N is the width of a head's plain part, D of its rotary part, V of its value; R is the latent's.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C; YaRN (arXiv 2309.00071).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deeptalk_edge.model.spec import LATENT_NORM_EPS, DecoderSpec


class Cache:
    """Latents and rotary keys (B, S, R + D) of every layer; all of a batch have the same S."""

    def __init__(self) -> None:
        self._layers: list[Tensor] = []

    @property
    def num_rows(self) -> int:
        return self._layers[0].shape[1] if self._layers else 0

    def extend(self, layer: int, latents: Tensor) -> Tensor:
        """Append (B, T, R + D) to a layer, layers in order; returns all of it, (B, S, R + D)."""
        if layer == len(self._layers):
            self._layers.append(latents)
        else:
            self._layers[layer] = torch.cat([self._layers[layer], latents], dim=1)
        return self._layers[layer]


class LatentAttention(nn.Module):
    """Multi-head latent attention with a plain query projection (`q_lora_rank` null)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.spec = spec
        heads = spec.num_heads
        query_width = heads * (spec.nope_dim + spec.rope_dim)
        key_value_width = heads * (spec.nope_dim + spec.value_dim)
        self.q_proj = nn.Linear(spec.width, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(spec.width, spec.cache_width, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(spec.latent_dim, eps=LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(spec.latent_dim, key_value_width, bias=False)
        self.o_proj = nn.Linear(heads * spec.value_dim, spec.width, bias=False)

    def forward(self, hidden: Tensor, turns: Tensor, layer: int, cache: Cache | None) -> Tensor:
        """(B, T, C) to (B, T, C); `turns` as of `rotary_turns` for these T rows."""
        latents = self.latents(hidden, turns)
        if cache is not None:
            latents = cache.extend(layer, latents)
        heads = expanded_attention(self, self.queries(hidden, turns), latents)
        out: Tensor = self.o_proj(heads.flatten(2))
        return out

    def queries(self, hidden: Tensor, turns: Tensor) -> Tensor:
        """Queries (B, T, H, N + D), the rotary part turned."""
        queries = self.q_proj(hidden).unflatten(-1, (self.spec.num_heads, -1))
        nope, rope = queries.split([self.spec.nope_dim, self.spec.rope_dim], dim=-1)
        return torch.cat([nope, rotate(rope, turns[:, :, None])], dim=-1)

    def latents(self, hidden: Tensor, turns: Tensor) -> Tensor:
        """What the cache keeps (B, T, R + D): the normed latent, then the heads' turned key."""
        latent, key = self.kv_a_proj_with_mqa(hidden).split(
            [self.spec.latent_dim, self.spec.rope_dim], dim=-1
        )
        return torch.cat([self.kv_a_layernorm(latent), rotate(key, turns)], dim=-1)


def expanded_attention(attention: LatentAttention, queries: Tensor, latents: Tensor) -> Tensor:
    """Attention by definition: queries (B, T, H, N + D) of the last T of S latents (B, S, R + D).

    Returns the heads' values (B, T, H, V).
    """
    spec = attention.spec
    latent, rope_key = torch.split(latents, [spec.latent_dim, spec.rope_dim], dim=-1)
    keys_values = attention.kv_b_proj(latent).unflatten(-1, (spec.num_heads, -1))
    nope_key, values = keys_values.split([spec.nope_dim, spec.value_dim], dim=-1)
    shared = rope_key[:, :, None].expand(-1, -1, spec.num_heads, -1)
    keys = torch.cat([nope_key, shared], dim=-1)
    heads = dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        spec.softmax_scale,
        is_causal=True,
    )
    return heads.transpose(1, 2)


def dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, is_causal: bool
) -> Tensor:
    """softmax(scale q k^T) v: (B, H, T, D), (B, H, S, D), (B, H, S, V) to (B, H, T, V).

    Causal queries are those of the last T of S rows. Spelt out on a processor, where torch's fused
    kernels take three times as long to go back through, or refuse V unequal to D and compute in
    float32 whatever they are given.
    """
    num_rows, num_keys = query.shape[2], key.shape[2]
    visible = _visible(num_rows, num_keys, query.device) if is_causal else None
    if query.device.type != "cpu":
        is_square = num_rows == num_keys
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if is_square else visible,
            is_causal=is_causal and is_square,
            scale=scale,
        )
    scores = (query * scale) @ key.transpose(2, 3)
    if visible is not None:
        scores = scores + visible.to(scores.dtype).log()
    return scores.softmax(dim=-1).to(value.dtype) @ value


def absorbed_attention(attention: LatentAttention, queries: Tensor, latents: Tensor) -> Tensor:
    """The same heads, kv_b moved into the query and the output: the cache is read as it is.

    q . (W_k c) = (W_k^T q) . c, and the weighted sum of W_v c is W_v of the weighted sum.
    """
    spec = attention.spec
    up = attention.kv_b_proj.weight.view(spec.num_heads, -1, spec.latent_dim)
    key_up, value_up = torch.split(up, [spec.nope_dim, spec.value_dim], dim=1)
    nope, rope = torch.split(queries, [spec.nope_dim, spec.rope_dim], dim=-1)
    absorbed = torch.cat([torch.einsum("bthn,hnr->bthr", nope, key_up), rope], dim=-1)
    scores = torch.einsum("bthc,bsc->bhts", absorbed, latents) * spec.softmax_scale
    visible = _visible(queries.shape[1], latents.shape[1], latents.device)
    shares = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32)
    latent = latents[..., : spec.latent_dim]
    context = torch.einsum("bhts,bsr->bthr", shares.to(latent.dtype), latent)
    return torch.einsum("bthr,hvr->bthv", context, value_up)


def rotary_turns(spec: DecoderSpec, start: int, num_rows: int, device: torch.device) -> Tensor:
    """Cosines and sines (2, T, D) of the rows from `start` on, always in float32."""
    frequencies = torch.tensor(spec.rope_frequencies(), dtype=torch.float32, device=device)
    positions = torch.arange(start, start + num_rows, dtype=torch.float32, device=device)
    angles = (positions[:, None] * frequencies).repeat(1, 2)
    return torch.stack([angles.cos(), angles.sin()]) * spec.rope_amplitude


def rotate(pairs: Tensor, turns: Tensor) -> Tensor:
    """Turn (..., D) by (2, ..., D); a pair is side by side here, so de-interleave first."""
    halves = pairs.view(*pairs.shape[:-1], -1, 2).transpose(-1, -2).flatten(-2)
    left, right = halves.chunk(2, dim=-1)
    cos, sin = turns
    turned: Tensor = halves * cos + torch.cat([-right, left], dim=-1) * sin
    return turned.to(pairs.dtype)


def _visible(num_rows: int, num_keys: int, device: torch.device) -> Tensor:
    """(T, S), true where one of the last T rows may look: at itself and all before it."""
    return torch.ones(num_rows, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_rows)
