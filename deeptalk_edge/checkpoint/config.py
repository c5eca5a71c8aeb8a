"""Reads the specs of a checkpoint from its config files.

`config.json` follows DeepSeek-V2 with the fields that DeepTalk adds; the encoder's sizes stand in
the `config.json` of a Whisper directory, the codec's in that of a SNAC directory. Whatever the
reference model does not build is refused by name.

Source: the official checkpoint layout (`src/model/vita_arch.py`, `configuration_deepseek.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import (
    CodecSpec,
    DecoderSpec,
    EncoderSpec,
    ModelSpec,
    Rates,
    VocabularySpec,
    Width,
    YarnSpec,
)
from deeptalk_edge.schema import Between, checked, from_config, read_json

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

MODEL_TYPES = (
    "deepseek_v2",
    "vita-deepseek_v2",
    "lucy-deepseek_v2",
    "puremoe-deepseek_v2",
    "moextend-deepseek_v2",
)
"""Every spelling of `model_type` under which DeepTalk checkpoints have been saved."""


# Our name for each field, and theirs.
_DECODER = {
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
    "latent_dim": "kv_lora_rank",
    "dense_ffn_width": "intermediate_size",
    "expert_ffn_width": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "top_k": "num_experts_per_tok",
    "num_dense_layers": "first_k_dense_replace",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings",
    "normalise_top_k": "norm_topk_prob",
    "routed_scale": "routed_scaling_factor",
}
_YARN = {
    "factor": "factor",
    "original_positions": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
_ENCODER = {
    "num_mel_bins": "num_mel_bins",
    "width": "d_model",
    "num_layers": "encoder_layers",
    "num_heads": "encoder_attention_heads",
    "ffn_width": "encoder_ffn_dim",
    "max_frames": "max_source_positions",
}
_SUPPORTED: dict[str, tuple[Any, Sequence[Any]]] = {
    "q_lora_rank": (1536, (None,)),
    "scoring_func": ("softmax", ("softmax",)),
    "topk_method": ("greedy", ("greedy",)),
    "moe_layer_freq": (1, (1,)),
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
    "mlp_bias": (False, (False,)),
    "rope_parameters": (None, (None,)),
    "mm_audio_encoder_type": ("whisper", ("whisper",)),
    "mm_audio_projector_type": ("linear", ("linear",)),
    "post_tts_adapter": (False, (False,)),
    "text_alignment": ("ahead", ("ahead", "word")),
}
"""What an absent field means upstream, and what this project builds of it."""
_SUPPORTED_ENCODER: dict[str, tuple[Any, Sequence[Any]]] = {
    "activation_function": ("gelu", ("gelu",))
}
_SUPPORTED_CODEC: dict[str, tuple[Any, Sequence[Any]]] = {"attn_window_size": (32, (None,))}
_VOCABULARY = {
    "text_size": "text_vocab_size_padded",
    "num_codebooks": "mm_audio_num_codebook",
    "codebook_size": "audio_vocab_size",
    "codebook_block": "audio_vocab_size_padded",
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "text_specials": "text_additional_tokens",
    "audio_specials": "audio_additional_tokens",
}


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a checkpoint's config files say. A verb reads it once and hands it on."""

    directory: Path
    content: Mapping[str, Any]
    """config.json as it is."""

    model: ModelSpec
    """With `tied_head` as config.json has it; the stored tensors may correct it."""

    @cached_property
    def generation(self) -> Mapping[str, Any]:
        """The object `deeptalk` of generation_config.json; empty if there is none.

        Raises ArtifactError if it is not an object, or the file is not one.
        """
        path = self.directory / GENERATION_CONFIG
        found = read_json(path).get("deeptalk", {}) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ArtifactError(f"{path}: deeptalk is a {type(found).__name__}, expected an object")
        return found


def read_config(checkpoint: Path, encoder_directory: Path | None = None) -> CheckpointConfig:
    """Read the config files of a checkpoint in the official layout.

    `encoder_directory` replaces `mm_audio_encoder`, which in released checkpoints is a path on
    their authors' disk; only its config.json is read.

    Raises ArtifactError if a file or a field is missing or holds something that we do not support.
    """
    path = checkpoint / CONFIG
    config = read_json(path)
    return CheckpointConfig(
        directory=checkpoint, content=config, model=_model_spec(config, path, encoder_directory)
    )


def read_model_spec(checkpoint: Path) -> ModelSpec:
    """The sizes and ids of a checkpoint alone. Raises ArtifactError as `read_config`."""
    return read_config(checkpoint).model


def _model_spec(config: Mapping[str, Any], path: Path, encoder_directory: Path | None) -> ModelSpec:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ArtifactError(
            f"{path}: model_type {model_type!r} is not a DeepTalk checkpoint; known are "
            + ", ".join(MODEL_TYPES)
        )
    if encoder_directory is None:
        encoder_directory = path.parent / str(_need(config, "mm_audio_encoder", path))
    encoder_path = encoder_directory / CONFIG
    try:
        has_config = encoder_path.is_file()
    except OSError:  # a name that no file can have
        has_config = False
    if not has_config:
        raise ArtifactError(
            f"{path}: mm_audio_encoder names {encoder_directory}, which holds no config.json; "
            "name a Whisper directory with --encoder"
        )
    encoder_config = read_json(encoder_path)
    _refuse_unsupported(config, _SUPPORTED, path)
    _refuse_unsupported(encoder_config, _SUPPORTED_ENCODER, encoder_path)
    return ModelSpec(
        decoder=_decoder_spec(config, path),
        encoder=from_config(EncoderSpec, encoder_config, _ENCODER, str(encoder_path)),
        projector_width=_checked(Width, config, "mm_audio_projector_hidden_size", path),
        vocabulary=_vocabulary_spec(config, path),
        text_alignment=config.get("text_alignment", "ahead"),
        # DeepSeek-V2 is untied where nothing is said, DeepTalk never; a head that is stored all the
        # same is compared with the embedding (checkpoint.py).
        tied_head=checked(
            bool, config.get("tie_word_embeddings", True), f"{path}: tie_word_embeddings"
        ),
    )


def read_codec_spec(directory: Path) -> CodecSpec:
    """Read SNAC's config.json.

    Raises ArtifactError if it is missing, lacks a field or has windowed attention.
    """
    path = directory / CONFIG
    config = read_json(path)
    _refuse_unsupported(config, _SUPPORTED_CODEC, path)
    if config.get("latent_dim") is None:  # SNAC's own default
        rates = _checked(Rates, config, "encoder_rates", path)
        config["latent_dim"] = _checked(Width, config, "encoder_dim", path) << len(rates)
    names = {field.name: field.name for field in fields(CodecSpec)}
    return from_config(CodecSpec, config, names, str(path))


def _checked(hint: Any, config: Mapping[str, Any], key: str, path: Path) -> Any:
    return checked(hint, _need(config, key, path), f"{path}: {key}")


def _need(config: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in config:
        raise ArtifactError(f"{path}: the field {key!r} is missing")
    return config[key]


def _refuse_unsupported(
    config: Mapping[str, Any], supported: Mapping[str, tuple[Any, Sequence[Any]]], path: Path
) -> None:
    """Refuse every structural choice that the reference model does not build."""
    for key, (default, values) in supported.items():
        if config.get(key, default) in values:
            continue
        known = " or ".join(map(json.dumps, values))
        found = f"= {config[key]!r}" if key in config else f"is absent, which means {default!r}"
        raise ArtifactError(f"{path}: {key} {found}; this project builds {known}")


def _decoder_spec(config: Mapping[str, Any], path: Path) -> DecoderSpec:
    if config.get("n_shared_experts") is None:
        config = {**config, "n_shared_experts": 0}
    spec = from_config(DecoderSpec, config, _DECODER, str(path))
    if "moextend" in config["model_type"]:  # it keeps the text experts and appends its own
        added = _checked(Annotated[int, Between(0, 2048)], config, "audio_num_experts", path)
        spec = replace(spec, num_experts=spec.num_experts + added)
    return replace(spec, yarn=_yarn_spec(config.get("rope_scaling"), path))


def _yarn_spec(scaling: object, path: Path) -> YarnSpec | None:
    if scaling is None:
        return None
    kind = scaling.get("type", scaling.get("rope_type")) if isinstance(scaling, dict) else scaling
    if kind != "yarn":
        raise ArtifactError(f"{path}: rope_scaling type {kind!r}, this project builds 'yarn'")
    return from_config(YarnSpec, scaling, _YARN, f"{path}: rope_scaling")


def _vocabulary_spec(config: Mapping[str, Any], path: Path) -> VocabularySpec:
    vocabulary = from_config(VocabularySpec, config, _VOCABULARY, str(path))
    if vocabulary.size != _need(config, "vocab_size", path):
        raise ArtifactError(
            f"{path}: vocab_size = {config['vocab_size']!r}, but text and codebooks add up to "
            f"{vocabulary.size}"
        )
    return vocabulary
