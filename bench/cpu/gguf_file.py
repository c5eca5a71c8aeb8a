"""A GGUF file of a spec's shapes for the llama.cpp family: deepseek2, random Q4_0 weights."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.model.spec import ModelSpec

_BLOCK_BYTES, _BLOCK_WEIGHTS = 18, 32


def write_gguf(place: Path, spec: ModelSpec) -> None:
    """Write the model.

    Raises ImportError if the package gguf is not installed.
    """
    gguf: Any = importlib.import_module("gguf")
    decoder = spec.decoder
    writer = gguf.GGUFWriter(place, "deepseek2")
    _write_sizes(writer, gguf, spec)
    random = np.random.default_rng(0)

    def quantised(name: str, *shape: int) -> None:
        num_bytes = int(np.prod(shape)) // _BLOCK_WEIGHTS * _BLOCK_BYTES
        # Not repeated: with equal rows all tokens would come to choose the same experts.
        blocks = np.frombuffer(bytearray(random.bytes(num_bytes)), np.uint8)
        blocks = blocks.reshape(-1, _BLOCK_BYTES)
        blocks[:, :2] = np.array([0.004], np.float16).view(np.uint8)
        columns = shape[-1] // _BLOCK_WEIGHTS * _BLOCK_BYTES
        stored = blocks.reshape(*shape[:-1], columns)
        writer.add_tensor(name, stored, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    def ones(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    width, heads, latent = decoder.width, decoder.num_heads, decoder.latent_dim
    quantised("token_embd.weight", spec.vocabulary.size, width)
    quantised("output.weight", spec.vocabulary.size, width)
    ones("output_norm.weight", width)
    for layer in range(decoder.num_layers):
        prefix = f"blk.{layer}."
        ones(f"{prefix}attn_norm.weight", width)
        ones(f"{prefix}attn_kv_a_norm.weight", latent)
        ones(f"{prefix}ffn_norm.weight", width)
        query_rows = heads * (decoder.nope_dim + decoder.rope_dim)
        quantised(f"{prefix}attn_q.weight", query_rows, width)
        quantised(f"{prefix}attn_kv_a_mqa.weight", decoder.cache_width, width)
        quantised(f"{prefix}attn_k_b.weight", heads, latent, decoder.nope_dim)
        quantised(f"{prefix}attn_v_b.weight", heads, decoder.value_dim, latent)
        quantised(f"{prefix}attn_output.weight", width, heads * decoder.value_dim)
        mlps: list[tuple[str, tuple[int, ...], int]]
        if layer not in decoder.moe_layers:
            mlps = [("", (), decoder.dense_ffn_width)]
        else:
            router = random.standard_normal((decoder.num_experts, width), np.float32)
            writer.add_tensor(f"{prefix}ffn_gate_inp.weight", router)
            experts = (decoder.num_experts,)
            mlps = [("_exps", experts, decoder.expert_ffn_width)]
            if decoder.num_shared_experts:
                mlps.append(("_shexp", (), decoder.shared_ffn_width))
        for kind, count, ffn_width in mlps:
            quantised(f"{prefix}ffn_gate{kind}.weight", *count, ffn_width, width)
            quantised(f"{prefix}ffn_up{kind}.weight", *count, ffn_width, width)
            quantised(f"{prefix}ffn_down{kind}.weight", *count, width, ffn_width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, gguf: Any, spec: ModelSpec) -> None:
    decoder, kind = spec.decoder, "deepseek2.attention."
    writer.add_block_count(decoder.num_layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(decoder.width)
    writer.add_feed_forward_length(decoder.dense_ffn_width)
    writer.add_head_count(decoder.num_heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(decoder.norm_eps)
    writer.add_rope_freq_base(decoder.rope_theta)
    writer.add_rope_dimension_count(decoder.rope_dim)
    writer.add_vocab_size(spec.vocabulary.size)
    writer.add_uint32(f"{kind}kv_lora_rank", decoder.latent_dim)
    # The loader takes 26 or 27 layers for "Lite"; other numbers need a query rank, and 0 means
    # none.
    writer.add_uint32(f"{kind}q_lora_rank", 0)
    writer.add_key_length(decoder.cache_width)
    writer.add_value_length(decoder.latent_dim)
    writer.add_uint32(f"{kind}key_length_mla", decoder.nope_dim + decoder.rope_dim)
    writer.add_uint32(f"{kind}value_length_mla", decoder.value_dim)
    writer.add_leading_dense_block_count(decoder.num_dense_layers)
    writer.add_expert_count(decoder.num_experts)
    writer.add_expert_used_count(decoder.top_k)
    writer.add_expert_shared_count(decoder.num_shared_experts)
    writer.add_expert_feed_forward_length(decoder.expert_ffn_width)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_weights_norm(False)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_tokenizer_model("none")
    writer.add_file_type(2)
