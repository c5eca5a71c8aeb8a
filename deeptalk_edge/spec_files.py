"""Reads the specs of a checkpoint from its config files.

`config.json` follows DeepSeek-V2 with the fields that DeepTalk adds; the encoder's sizes stand in
the `config.json` of a Whisper directory, the codec's in that of a SNAC directory. Whatever the
reference model does not build is refused by name.

Source: the official checkpoint layout (`src/model/vita_arch.py`, `configuration_deepseek.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.schema import read_json
from deeptalk_edge.spec import (
    CodecSpec,
    DecoderSpec,
    EncoderSpec,
    ModelSpec,
    VocabularySpec,
    YarnSpec,
)

MODEL_TYPES = (
    "deepseek_v2",
    "vita-deepseek_v2",
    "lucy-deepseek_v2",
    "puremoe-deepseek_v2",
    "moextend-deepseek_v2",
)
"""Every spelling of `model_type` under which DeepTalk checkpoints have been saved."""


def read_model_spec(checkpoint: Path, encoder_directory: Path | None = None) -> ModelSpec:
    """Read the sizes and ids of a checkpoint in the official layout.

    `encoder_directory` replaces `mm_audio_encoder`, which in released checkpoints is a path on
    their authors' disk; only its config.json is read.

    Raises ArtifactError if a file or a field is missing or holds something that we do not support.
    """
    path = checkpoint / "config.json"
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ArtifactError(
            f"{path}: model_type {model_type!r} is not a DeepTalk checkpoint; known are "
            + ", ".join(MODEL_TYPES)
        )
    if encoder_directory is None:
        encoder_directory = checkpoint / str(_need(config, "mm_audio_encoder", path))
    encoder_path = encoder_directory / "config.json"
    if not encoder_path.is_file():
        raise ArtifactError(
            f"{path}: mm_audio_encoder names {encoder_directory}, which holds no config.json; "
            "name a Whisper directory with --encoder"
        )
    _refuse_unsupported(config, path)
    return ModelSpec(
        decoder=_decoder_spec(config, path),
        encoder=_encoder_spec(read_json(encoder_path), encoder_path),
        projector_width=_need(config, "mm_audio_projector_hidden_size", path),
        vocabulary=_vocabulary_spec(config, path),
        text_alignment=config.get("text_alignment", "ahead"),
    )


def read_codec_spec(directory: Path) -> CodecSpec:
    """Read SNAC's config.json.

    Raises ArtifactError if it is missing, lacks a field or asks for windowed attention.
    """
    path = directory / "config.json"
    config = read_json(path)
    if config.get("attn_window_size") is not None:
        raise ArtifactError(f"{path}: attn_window_size is set; only SNAC without it is known")
    rates = tuple(_need(config, "encoder_rates", path))
    encoder_dim = _need(config, "encoder_dim", path)
    latent_dim = config.get("latent_dim")
    return CodecSpec(
        sampling_rate=_need(config, "sampling_rate", path),
        encoder_dim=encoder_dim,
        encoder_rates=rates,
        latent_dim=encoder_dim * 2 ** len(rates) if latent_dim is None else latent_dim,
        decoder_dim=_need(config, "decoder_dim", path),
        decoder_rates=tuple(_need(config, "decoder_rates", path)),
        codebook_size=_need(config, "codebook_size", path),
        codebook_dim=_need(config, "codebook_dim", path),
        vq_strides=tuple(_need(config, "vq_strides", path)),
        noise=_need(config, "noise", path),
        depthwise=_need(config, "depthwise", path),
    )


def _need(config: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in config:
        raise ArtifactError(f"{path}: the field {key!r} is missing")
    return config[key]


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    """Refuse every structural choice that the reference model does not build."""
    supported: dict[str, Sequence[Any]] = {
        "q_lora_rank": (None,),
        "scoring_func": ("softmax",),
        "topk_method": ("greedy",),
        "moe_layer_freq": (1,),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "tie_word_embeddings": (True,),
        "mm_audio_encoder_type": ("whisper",),
        "mm_audio_projector_type": ("linear",),
        "post_tts_adapter": (False,),
        "text_alignment": ("ahead", "word"),
    }
    for key, values in supported.items():
        if key in config and config[key] not in values:
            known = " or ".join(repr(value) for value in values)
            raise ArtifactError(f"{path}: {key} = {config[key]!r}, this project builds {known}")


def _decoder_spec(config: Mapping[str, Any], path: Path) -> DecoderSpec:
    def need(key: str) -> Any:
        return _need(config, key, path)

    scaling = config.get("rope_scaling")
    yarn = None
    if scaling:
        kind = scaling.get("type", scaling.get("rope_type"))
        if kind != "yarn":
            raise ArtifactError(f"{path}: rope_scaling type {kind!r}, this project builds 'yarn'")
        yarn = YarnSpec(
            factor=_need(scaling, "factor", path),
            original_positions=_need(scaling, "original_max_position_embeddings", path),
            beta_fast=scaling.get("beta_fast", 32),
            beta_slow=scaling.get("beta_slow", 1),
            mscale=scaling.get("mscale", 1),
            mscale_all_dim=scaling.get("mscale_all_dim", 0),
        )
    # moextend keeps the text experts and adds its own behind them.
    added_experts = need("audio_num_experts") if "moextend" in config["model_type"] else 0
    return DecoderSpec(
        width=need("hidden_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=need("num_attention_heads"),
        nope_dim=need("qk_nope_head_dim"),
        rope_dim=need("qk_rope_head_dim"),
        value_dim=need("v_head_dim"),
        latent_dim=need("kv_lora_rank"),
        dense_ffn_width=need("intermediate_size"),
        expert_ffn_width=need("moe_intermediate_size"),
        num_experts=need("n_routed_experts") + added_experts,
        num_shared_experts=need("n_shared_experts"),
        top_k=need("num_experts_per_tok"),
        num_dense_layers=need("first_k_dense_replace"),
        norm_eps=need("rms_norm_eps"),
        rope_theta=need("rope_theta"),
        max_positions=need("max_position_embeddings"),
        normalise_top_k=config.get("norm_topk_prob", False),
        routed_scale=config.get("routed_scaling_factor", 1.0),
        yarn=yarn,
    )


def _encoder_spec(config: Mapping[str, Any], path: Path) -> EncoderSpec:
    def need(key: str) -> Any:
        return _need(config, key, path)

    return EncoderSpec(
        num_mel_bins=need("num_mel_bins"),
        width=need("d_model"),
        num_layers=need("encoder_layers"),
        num_heads=need("encoder_attention_heads"),
        ffn_width=need("encoder_ffn_dim"),
        max_frames=need("max_source_positions"),
    )


def _vocabulary_spec(config: Mapping[str, Any], path: Path) -> VocabularySpec:
    def need(key: str) -> Any:
        return _need(config, key, path)

    vocabulary = VocabularySpec(
        text_size=need("text_vocab_size_padded"),
        num_codebooks=need("mm_audio_num_codebook"),
        codebook_size=need("audio_vocab_size"),
        codebook_block=need("audio_vocab_size_padded"),
        bos=need("bos_token_id"),
        eos=need("eos_token_id"),
        text_specials=dict(need("text_additional_tokens")),
        audio_specials=dict(need("audio_additional_tokens")),
    )
    if vocabulary.size != need("vocab_size"):
        raise ArtifactError(
            f"{path}: vocab_size = {config['vocab_size']}, but text and codebooks add up to "
            f"{vocabulary.size}"
        )
    for name, specials in (
        ("text_additional_tokens", ("EOT", "PAD_T")),
        ("audio_additional_tokens", ("EOA", "PAD_A", "BOA")),
    ):
        missing = [special for special in specials if special not in config[name]]
        if missing:
            raise ArtifactError(f"{path}: {name} lacks {', '.join(missing)}")
    return vocabulary
