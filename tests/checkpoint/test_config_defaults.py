"""What an absent or null field of a config file means: the same as upstream, or a refusal by name.

The table is the audit. Upstream's defaults are those of DeepSeek-V2's configuration_deepseek.py and
modeling_deepseek.py, of Whisper's WhisperConfig in transformers, and of SNAC's constructor. Sizes
and ids have no defaults, because every model has its own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import WhisperConfig

from deeptalk_edge.checkpoint.config import read_codec_spec, read_model_spec
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.schema import read_json
from deeptalk_edge.training.checkpoint import config_of, encoder_config_of
from tests.specs import PLAIN, SNAC_CONFIG, YARN

REFUSED = "refused"
DEEPSEEK, YARN_SCALING, WHISPER, SNAC = (
    "config.json",
    "config.json: rope_scaling",
    "audio_encoder/config.json",
    "snac/config.json",
)


class Field(NamedTuple):
    """A field of a config file; `absent` and `null` are the values it has in these cases."""

    file: str
    name: str
    upstream: Any
    """Upstream's value for an absent field; REFUSED if upstream needs the field."""
    absent: Any
    null: Any = REFUSED


FIELDS = [
    # DeepSeek-V2. Sizes and ids.
    Field(DEEPSEEK, "vocab_size", 102400, REFUSED),
    Field(DEEPSEEK, "hidden_size", 4096, REFUSED),
    Field(DEEPSEEK, "intermediate_size", 11008, REFUSED),
    Field(DEEPSEEK, "moe_intermediate_size", 1407, REFUSED),
    Field(DEEPSEEK, "num_hidden_layers", 30, REFUSED),
    Field(DEEPSEEK, "num_attention_heads", 32, REFUSED),
    Field(DEEPSEEK, "kv_lora_rank", 512, REFUSED),
    Field(DEEPSEEK, "qk_rope_head_dim", 64, REFUSED),
    Field(DEEPSEEK, "qk_nope_head_dim", 128, REFUSED),
    Field(DEEPSEEK, "v_head_dim", 128, REFUSED),
    Field(DEEPSEEK, "n_routed_experts", None, REFUSED),  # None: no layer routes
    Field(DEEPSEEK, "num_experts_per_tok", None, REFUSED),  # None: the gate fails
    Field(DEEPSEEK, "first_k_dense_replace", 0, REFUSED),
    Field(DEEPSEEK, "max_position_embeddings", 2048, REFUSED),
    Field(DEEPSEEK, "rms_norm_eps", 1e-6, REFUSED),
    Field(DEEPSEEK, "rope_theta", 10000.0, REFUSED),
    Field(DEEPSEEK, "bos_token_id", 100000, REFUSED),
    Field(DEEPSEEK, "eos_token_id", 100001, REFUSED),
    # DeepSeek-V2. Choices.
    Field(DEEPSEEK, "q_lora_rank", 1536, REFUSED, None),
    Field(DEEPSEEK, "n_shared_experts", None, None, None),
    Field(DEEPSEEK, "norm_topk_prob", False, False),
    Field(DEEPSEEK, "routed_scaling_factor", 1.0, 1.0),
    Field(DEEPSEEK, "scoring_func", "softmax", "softmax"),
    # Its default is misspelt "gready", which its gate does not know; it means greedy.
    Field(DEEPSEEK, "topk_method", REFUSED, "greedy"),
    Field(DEEPSEEK, "moe_layer_freq", 1, 1),
    Field(DEEPSEEK, "hidden_act", "silu", "silu"),
    Field(DEEPSEEK, "attention_bias", False, False),
    Field(DEEPSEEK, "rope_scaling", None, None, None),
    # DeepTalk ties its heads; a stored head that differs is refused until this says false.
    Field(DEEPSEEK, "tie_word_embeddings", False, True),
    # Of transformers 5, where `rope_parameters` replaces rope_theta and rope_scaling.
    Field(DEEPSEEK, "mlp_bias", False, False),
    Field(DEEPSEEK, "rope_parameters", None, None, None),
    # YaRN.
    Field(YARN_SCALING, "type", REFUSED, REFUSED),
    Field(YARN_SCALING, "factor", REFUSED, REFUSED),
    Field(YARN_SCALING, "original_max_position_embeddings", 4096, REFUSED),
    Field(YARN_SCALING, "beta_fast", 32.0, 32.0),
    Field(YARN_SCALING, "beta_slow", 1.0, 1.0),
    Field(YARN_SCALING, "mscale", 1.0, 1.0),
    Field(YARN_SCALING, "mscale_all_dim", 0.0, 0.0),
    # DeepTalk.
    Field(DEEPSEEK, "mm_audio_encoder", REFUSED, REFUSED),
    Field(DEEPSEEK, "mm_audio_encoder_type", "whisper", "whisper"),
    Field(DEEPSEEK, "mm_audio_projector_type", "linear", "linear"),
    Field(DEEPSEEK, "mm_audio_projector_hidden_size", REFUSED, REFUSED),
    Field(DEEPSEEK, "mm_audio_num_codebook", REFUSED, REFUSED),
    Field(DEEPSEEK, "post_tts_adapter", False, False),
    Field(DEEPSEEK, "text_vocab_size_padded", REFUSED, REFUSED),
    Field(DEEPSEEK, "audio_vocab_size", REFUSED, REFUSED),
    Field(DEEPSEEK, "audio_vocab_size_padded", REFUSED, REFUSED),
    Field(DEEPSEEK, "text_additional_tokens", REFUSED, REFUSED),
    Field(DEEPSEEK, "audio_additional_tokens", REFUSED, REFUSED),
    Field(DEEPSEEK, "text_alignment", "ahead", "ahead"),  # ours: the official grid knows no other
    # Whisper.
    Field(WHISPER, "num_mel_bins", 80, REFUSED),
    Field(WHISPER, "d_model", 384, REFUSED),
    Field(WHISPER, "encoder_layers", 4, REFUSED),
    Field(WHISPER, "encoder_attention_heads", 6, REFUSED),
    Field(WHISPER, "encoder_ffn_dim", 1536, REFUSED),
    Field(WHISPER, "max_source_positions", 1500, REFUSED),
    Field(WHISPER, "activation_function", "gelu", "gelu"),
    # SNAC.
    *(
        Field(SNAC, name, default, REFUSED)
        for name, default in {
            "sampling_rate": 44100,
            "encoder_dim": 64,
            "encoder_rates": [3, 3, 7, 7],
            "decoder_dim": 1536,
            "decoder_rates": [7, 7, 3, 3],
            "codebook_size": 4096,
            "codebook_dim": 8,
            "vq_strides": [8, 4, 2, 1],
            "noise": True,
            "depthwise": True,
        }.items()
    ),
    Field(SNAC, "latent_dim", None, None, None),
    Field(SNAC, "attn_window_size", 32, REFUSED, None),  # 32: attention, which we do not build
]

NO_MATTER = {
    "num_key_value_heads": "every head reads the one latent",
    "n_group": "of another topk_method",
    "topk_group": "of another topk_method",
    "aux_loss_alpha": "of training",
    "seq_aux": "of training",
    "initializer_range": "of training",
    "attention_dropout": "of training",
    "pretraining_tp": "read by no layer",
    "ep_size": "how experts are spread over processes",
    "use_cache": "of generation",
    "pad_token_id": "of the embedding's gradient",
}
"""The other fields of DeepSeek's configuration, and why they do not affect answers."""

Edit = Callable[[dict[str, Any]], None]


def says(name: str, value: Any) -> Edit:
    """An edit that sets a field."""
    return lambda holder: holder.update({name: value})


def written(place: Path, field: Field, edit: Edit) -> Path:
    """Complete config files with one edit of the object that holds a field."""
    spec = dataclasses.replace(
        PLAIN, decoder=dataclasses.replace(PLAIN.decoder, rope_dim=8, yarn=YARN)
    )
    files = {
        DEEPSEEK: config_of(spec),
        WHISPER: encoder_config_of(spec.encoder),
        SNAC: dict(SNAC_CONFIG),
    }
    holder = files[DEEPSEEK]["rope_scaling"] if field.file == YARN_SCALING else files[field.file]
    edit(holder)
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(json.dumps(content), encoding="utf-8")
    return place


def read(place: Path) -> Any:
    return read_model_spec(place), read_codec_spec(place / "snac")


def assert_means(place: Path, field: Field, edit: Edit, meant: Any) -> None:
    """The edited files equal files with an explicit value, or are refused by name."""
    edited = written(place / "edited", field, edit)
    if meant == REFUSED:
        with pytest.raises(ArtifactError, match=field.name):
            read(edited)
        return
    spelt = written(place / "spelt", field, says(field.name, meant))
    assert read(edited) == read(spelt)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: f"{field.file}: {field.name}")
def test_an_absent_field_means_what_the_audit_says(field: Field, tmp_path: Path) -> None:
    assert_means(tmp_path, field, lambda holder: holder.pop(field.name, None), field.absent)


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: f"{field.file}: {field.name}")
def test_a_null_field_means_what_the_audit_says(field: Field, tmp_path: Path) -> None:
    assert_means(tmp_path, field, says(field.name, None), field.null)


def test_nothing_is_assumed_that_upstream_does_not() -> None:
    """Except for fields with a reason in the table."""
    others = {f.name for f in FIELDS if f.absent != REFUSED and f.absent != f.upstream}
    assert others == {"topk_method", "tie_word_embeddings"}


@pytest.mark.parametrize("field", [f for f in FIELDS if f.file == WHISPER], ids=lambda f: f.name)
def test_whispers_defaults_are_those_of_transformers(field: Field) -> None:
    assert getattr(WhisperConfig(), field.name) == field.upstream


def test_shared_experts_of_null_are_none(tmp_path: Path) -> None:
    field = next(f for f in FIELDS if f.name == "n_shared_experts")
    for value in (None, 0):
        place = written(tmp_path, field, says(field.name, value))
        assert read_model_spec(place).decoder.num_shared_experts == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q_lora_rank", 1536),
        ("scoring_func", "sigmoid"),
        ("topk_method", "group_limited_greedy"),
        ("moe_layer_freq", 2),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_parameters", {"rope_type": "yarn", "factor": 40}),
        ("mm_audio_projector_type", "identity"),
        ("post_tts_adapter", True),
        ("activation_function", "relu"),
        ("attn_window_size", 32),
    ],
)
def test_an_unsupported_structure_is_refused_by_name(name: str, value: Any, tmp_path: Path) -> None:
    field = next(f for f in FIELDS if f.name == name)
    assert_means(tmp_path, field, says(name, value), REFUSED)


@pytest.mark.parametrize("name", NO_MATTER)
def test_a_field_that_does_not_matter_does_not(name: str, tmp_path: Path) -> None:
    field = Field(DEEPSEEK, name, None, None)
    plain, other = (written(tmp_path / str(value), field, says(name, value)) for value in (1, 7))
    assert read(plain) == read(other)


def test_every_field_that_we_write_was_audited(tmp_path: Path) -> None:
    written(tmp_path, FIELDS[0], lambda holder: None)
    audited: Mapping[str, set[str]] = {
        DEEPSEEK: {f.name for f in FIELDS if f.file == DEEPSEEK} | NO_MATTER.keys() | OURS,
        WHISPER: {f.name for f in FIELDS if f.file == WHISPER} | {"model_type"},
        SNAC: {f.name for f in FIELDS if f.file == SNAC},
    }
    for file, names in audited.items():
        assert read_json(tmp_path / file).keys() <= names


OURS = {
    *("model_type", "mm_audio_encoder_hidden_size", "total_vocab_size", "text_vocab_size"),
    *("text_special_tokens", "audio_special_tokens", "tune_text_embed", "loss_reduction"),
    *("loss_weights", "tokenizer_padding_side", "tokenizer_model_max_length"),
    *("freeze_audio_experts", "freeze_text_experts"),
}
"""Fields of DeepTalk that follow from others or matter only in training."""
