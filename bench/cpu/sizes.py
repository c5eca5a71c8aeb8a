"""Bytes and operations of a decoder's pass, by the form of its weights."""

from __future__ import annotations

from dataclasses import dataclass

from deeptalk_edge.model.spec import DecoderSpec, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A contender's storage of a decoder."""

    weight_bits: float
    """Bits per weight, scales included."""

    cache_value_bytes: int

    head_weight_bits: float | None = None
    """Bits per weight of the heads' absorbed key and value matrices, if they differ."""


def step_bytes(spec: ModelSpec, form: Form, position: int) -> float:
    """Bytes that one row after `position` cached ones reads, all heads included."""
    decoder = spec.decoder
    heads = decoder.num_layers * _absorbed_weights(decoder)
    others = mlp_weights(decoder) + spec.vocabulary.size * decoder.width
    others += decoder.num_layers * _projection_weights(decoder)
    bits = others * form.weight_bits + heads * (form.head_weight_bits or form.weight_bits)
    routers_bytes = len(decoder.moe_layers) * decoder.num_experts * decoder.width * 4
    cache_bytes = decoder.num_layers * position * decoder.cache_width * form.cache_value_bytes
    return bits / 8 + routers_bytes + cache_bytes


def mlp_weights(decoder: DecoderSpec) -> int:
    """Number of weights of the MLPs and experts that one row uses."""
    experts = len(decoder.moe_layers) * (decoder.top_k + decoder.num_shared_experts)
    widths = experts * decoder.expert_ffn_width + decoder.num_dense_layers * decoder.dense_ffn_width
    return 3 * decoder.width * widths


def _projection_weights(decoder: DecoderSpec) -> int:
    query_rows = decoder.num_heads * (decoder.nope_dim + decoder.rope_dim)
    rows = query_rows + decoder.cache_width + decoder.num_heads * decoder.value_dim
    return rows * decoder.width


def _absorbed_weights(decoder: DecoderSpec) -> int:
    return decoder.num_heads * decoder.latent_dim * (decoder.nope_dim + decoder.value_dim)
