"""Checkpoints in torch: read one into a model, write one in the official layout.

Source: DeepTalk `vita_arch.py: initialize_additional_configs`; DeepSeek-V2-Lite's config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deeptalk_edge.checkpoint.config import CheckpointConfig, read_config
from deeptalk_edge.checkpoint.reader import Checkpoint, expected_tensors
from deeptalk_edge.checkpoint.shards import INDEX, WEIGHTS
from deeptalk_edge.errors import ArtifactError, DoesNotFit
from deeptalk_edge.files import staged_directory
from deeptalk_edge.model.spec import DecoderSpec, EncoderSpec, ModelSpec, VocabularySpec
from deeptalk_edge.training.lora import lora_delta
from deeptalk_edge.training.model import INITIAL_STD, DeepTalk
from deeptalk_edge.training.ranks import is_first

ENCODER_DIRECTORY = "audio_encoder"
SHARD_BYTES = 5 * 10**9  # Hugging Face's own

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def load_model(directory: Path) -> DeepTalk:
    """Read a checkpoint into a float32 model on the CPU.

    Raises ArtifactError if the checkpoint is not whole.
    """
    return model_of(read_config(directory))


def model_of(config: CheckpointConfig) -> DeepTalk:
    """As `load_model`, the checkpoint whose config files are read."""
    checkpoint = Checkpoint.of(config)
    model = DeepTalk(checkpoint.spec)
    _copy_weights(model, checkpoint)
    return model


def load_weights(model: DeepTalk, directory: Path) -> None:
    """Read a checkpoint of the same shape into a model that is there, sharded or not.

    Raises ArtifactError if it is not whole, or another model's.
    """
    checkpoint = Checkpoint.open(directory)
    if checkpoint.spec != model.spec:
        raise ArtifactError(f"{directory}: its config.json describes another model")
    _copy_weights(model, checkpoint)


def _copy_weights(model: DeepTalk, checkpoint: Checkpoint) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in expected_tensors(checkpoint.spec):
            parameter, stored = parameters[name], torch.from_numpy(checkpoint.tensor(name))
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is not None:
                from torch.distributed.tensor import DTensor, distribute_tensor

                assert isinstance(parameter, DTensor)
                stored = distribute_tensor(stored, mesh, parameter.placements, src_data_rank=None)
            parameter.copy_(stored)


def save_checkpoint(
    directory: Path,
    model: DeepTalk,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model as a new checkpoint: all of it appears under its name, or nothing does.

    `config` is what config.json is to hold (`config_of`), its torch_dtype aside.

    Raises ArtifactError if `directory` exists, DoesNotFit if the disk is full, ValueError if
    `dtype` is not float32, float16 or bfloat16.
    """
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"{dtype}: checkpoints hold {', '.join(_DTYPE_NAMES.values())}")
    if directory.exists():
        raise ArtifactError(f"{directory} exists; name another directory or remove it")
    with staged_directory(directory) as staging:
        write_checkpoint(staging, model, config, dtype=dtype, shard_bytes=shard_bytes)


def write_checkpoint(
    directory: Path,
    model: DeepTalk,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
    merged: bool = True,
) -> None:
    """Fill a directory with a model in the official layout, whatever the number of processes that
    it is sharded over; every process calls it, the first one writes.

    Adapters are added to the weights if `merged`, else left out. Raises DoesNotFit if the disk is
    full.
    """
    facts = {
        **config,
        "mm_audio_encoder": ENCODER_DIRECTORY,  # a released one names its authors' disk
        "torch_dtype": _DTYPE_NAMES[dtype],
    }
    if is_first():
        (directory / ENCODER_DIRECTORY).mkdir()
        _write_json(directory / "config.json", facts)
        encoder_config = encoder_config_of(model.spec.encoder)
        _write_json(directory / ENCODER_DIRECTORY / "config.json", encoder_config)
    _write_shards(directory, model, dtype, shard_bytes, merged)


def config_of(spec: ModelSpec, *, model_type: str = "lucy-deepseek_v2") -> dict[str, Any]:
    """The config.json of a model, from which `read_model_spec` gives the same `spec` again."""
    return {
        "model_type": model_type,
        **_decoder_config(spec.decoder),
        **_vocabulary_config(spec.vocabulary),
        "mm_audio_encoder": ENCODER_DIRECTORY,
        "mm_audio_encoder_type": "whisper",
        "mm_audio_encoder_hidden_size": spec.encoder.width,
        "mm_audio_projector_type": "linear",
        "mm_audio_projector_hidden_size": spec.projector_width,
        "mm_audio_num_codebook": spec.vocabulary.num_codebooks,
        "text_alignment": spec.text_alignment,
        "tune_text_embed": True,
        "tie_word_embeddings": spec.tied_head,
        "post_tts_adapter": False,
        "loss_reduction": "mean",
        "loss_weights": [1.0] * (spec.vocabulary.num_codebooks + 1),
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": spec.decoder.max_positions,
        "freeze_audio_experts": False,
        "freeze_text_experts": False,
    }


def encoder_config_of(spec: EncoderSpec) -> dict[str, Any]:
    """The config.json of the Whisper directory beside a checkpoint."""
    return {
        "model_type": "whisper",
        "num_mel_bins": spec.num_mel_bins,
        "d_model": spec.width,
        "encoder_layers": spec.num_layers,
        "encoder_attention_heads": spec.num_heads,
        "encoder_ffn_dim": spec.ffn_width,
        "max_source_positions": spec.max_frames,
    }


def _decoder_config(spec: DecoderSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_heads,
        "q_lora_rank": None,
        "kv_lora_rank": spec.latent_dim,
        "qk_nope_head_dim": spec.nope_dim,
        "qk_rope_head_dim": spec.rope_dim,
        "v_head_dim": spec.value_dim,
        "intermediate_size": spec.dense_ffn_width,
        "moe_intermediate_size": spec.expert_ffn_width,
        "first_k_dense_replace": spec.num_dense_layers,
        "moe_layer_freq": 1,
        "n_routed_experts": spec.num_experts,
        "n_shared_experts": spec.num_shared_experts or None,
        "num_experts_per_tok": spec.top_k,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": spec.normalise_top_k,
        "routed_scaling_factor": spec.routed_scale,
        "seq_aux": True,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm_eps,
        "initializer_range": INITIAL_STD,
        "rope_theta": spec.rope_theta,
        "max_position_embeddings": spec.max_positions,
        "rope_scaling": _rope_scaling(spec),
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def _rope_scaling(spec: DecoderSpec) -> dict[str, Any] | None:
    yarn = spec.yarn
    if yarn is None:
        return None
    return {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
    }


def _vocabulary_config(spec: VocabularySpec) -> dict[str, Any]:
    first_special = min(spec.text_specials.values())  # the specials end the block of text ids
    return {
        "bos_token_id": spec.bos,
        "eos_token_id": spec.eos,
        "vocab_size": spec.size,
        "total_vocab_size": spec.size,
        "text_vocab_size": first_special,
        "text_special_tokens": spec.text_size - first_special,
        "text_vocab_size_padded": spec.text_size,
        "audio_vocab_size": spec.codebook_size,
        "audio_special_tokens": spec.codebook_block - spec.codebook_size,
        "audio_vocab_size_padded": spec.codebook_block,
        "text_additional_tokens": dict(spec.text_specials),
        "audio_additional_tokens": dict(spec.audio_specials),
    }


def _write_shards(
    directory: Path, model: DeepTalk, dtype: torch.dtype, shard_bytes: int, merged: bool
) -> None:
    """Fill shards in the order of the state dict, none beyond `shard_bytes` but for one tensor; of
    a sharded model one shard at a time is gathered."""
    names = list(expected_tensors(model.spec))
    parameters = dict(model.named_parameters())
    sizes = {name: parameters[name].numel() * dtype.itemsize for name in names}
    shards = _split(sizes, shard_bytes)
    weight_map: dict[str, str] = {}
    for i, in_shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        stored = {name: _stored(model, name, parameters[name], dtype, merged) for name in in_shard}
        if is_first():
            _save_file(stored, directory / file)
        weight_map |= dict.fromkeys(in_shard, file)
    if len(shards) > 1 and is_first():
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(directory / INDEX, index)


def _save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # its way to say what the system refused
        raise DoesNotFit(f"{path}: cannot be written ({error}); free room on the disk") from error


def _split(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _stored(
    model: DeepTalk, name: str, parameter: Tensor, dtype: torch.dtype, merged: bool
) -> Tensor:
    full = getattr(parameter, "full_tensor", None)
    whole: Tensor = parameter.detach() if full is None else full().detach()
    delta = lora_delta(model, name) if merged else None
    if delta is not None:
        whole = whole + delta
    return whole.to("cpu", dtype).contiguous()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
