"""llama.cpp and ik_llama.cpp as contenders of `bench_cpu`, on the same shapes with random weights.

Their Python packages lie in a folder of their own (`make bench-cpu` installs them) and are loaded
from there, in the process that times them. Weights are Q4_0: 4.5 bits each, ours take 4.25.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.spec import ModelSpec

MODULES = {"llama.cpp": "llama_cpp", "ik_llama.cpp": "ik_llama_cpp._ctypes_api"}

_FILL_TOKENS = 128
_Q4_0_BYTES, _Q4_0_WEIGHTS = 18, 32


class LlamaPeer:
    """One of the two libraries with a model loaded."""

    def __init__(self, folder: Path, name: str, model: Path, *, threads: int) -> None:
        """Raises ImportError if the package is not in the folder, ValueError if it does not take
        the model."""
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # behind our own: numpy stays ours
        self._api: Any = importlib.import_module(MODULES[name])
        self._is_ik, self._threads = name == "ik_llama.cpp", threads
        self._random = np.random.default_rng(2)
        self._context: Any = None
        self._position = 0
        self._api.llama_backend_init()
        params = self._api.llama_model_default_params()
        params.n_gpu_layers = 0
        if self._is_ik:
            params.mla, params.repack_tensors, params.use_mmap = 3, True, False
            params.fit, params.ncmoe = False, 0
        self._model = self._api.llama_model_load_from_file(str(model).encode(), params)
        if not self._model:
            raise ValueError(f"{name} does not load {model}")

    def prepare(self, position: int, capacity: int) -> None:
        """A fresh context with `position` tokens in it."""
        self._free_context()
        params = self._api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = capacity + 512, 512, 512
        params.n_threads = params.n_threads_batch = self._threads
        if self._is_ik:
            params.flash_attn, params.mla_attn = True, 3
            params.fused_moe_up_gate = params.fused_up_gate = True
        self._context, self._position = self._api.llama_init_from_model(self._model, params), 0
        for start in range(0, position, _FILL_TOKENS):
            self.feed(min(_FILL_TOKENS, position - start))

    def feed(self, num_tokens: int) -> None:
        """Decode random tokens; the last one's logits are computed."""
        api = self._api
        tokens = self._random.integers(0, 100_000, num_tokens).tolist()
        ids = (api.llama_token * num_tokens)(*tokens)
        if not self._is_ik:
            status = api.llama_decode(self._context, api.llama_batch_get_one(ids, num_tokens))
            api.llama_synchronize(self._context)
        else:
            sequence = (api.llama_seq_id * 1)(0)
            pointer = ctypes.cast(sequence, ctypes.POINTER(api.llama_seq_id))
            places = range(self._position, self._position + num_tokens)
            batch = api.llama_batch()
            batch.n_tokens, batch.token = num_tokens, ids
            batch.pos = (api.llama_pos * num_tokens)(*places)
            batch.n_seq_id = (ctypes.c_int32 * num_tokens)(*[1] * num_tokens)
            batch.seq_id = (ctypes.POINTER(api.llama_seq_id) * num_tokens)(*[pointer] * num_tokens)
            batch.logits = (ctypes.c_int8 * num_tokens)(*[0] * (num_tokens - 1), 1)
            status = api.llama_decode(self._context, batch)
        if status:
            raise ValueError(f"llama_decode: {status} at {self._position}")
        self._position += num_tokens

    def close(self) -> None:
        self._free_context()
        free = getattr(self._api, "llama_model_free", None) or self._api.llama_free_model
        free(self._model)

    def _free_context(self) -> None:
        if self._context is not None:
            self._api.llama_free(self._context)
            self._context = None


def write_gguf(folder: Path, place: Path, spec: ModelSpec) -> None:
    """A deepseek2 model of the spec's shapes with random Q4_0 weights; `folder` holds `gguf`."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    gguf = importlib.import_module("gguf")
    decoder = spec.decoder
    writer = gguf.GGUFWriter(place, "deepseek2")
    _write_sizes(writer, gguf, spec)
    random = np.random.default_rng(0)

    def quantised(name: str, *shape: int) -> None:
        num_bytes = int(np.prod(shape)) // _Q4_0_WEIGHTS * _Q4_0_BYTES
        # Not repeated: else all tokens would come to choose the same experts.
        blocks = np.frombuffer(bytearray(random.bytes(num_bytes)), np.uint8)
        blocks = blocks.reshape(-1, _Q4_0_BYTES)
        blocks[:, :2] = np.array([0.004], np.float16).view(np.uint8)
        columns = shape[-1] // _Q4_0_WEIGHTS * _Q4_0_BYTES
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
    # "Lite" is known by 26 or 27 layers; any other number needs a query rank, and 0 says none.
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
