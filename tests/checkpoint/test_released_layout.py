"""The real model, without its weights: the released names and shapes, written out in full.

Source: the published config.json of DeepSeek-V2-Lite and Whisper-medium; DeepTalk's `vita_arch.py`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deeptalk_edge.checkpoint.config import read_model_spec
from deeptalk_edge.checkpoint.reader import expected_tensors
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.training.checkpoint import config_of
from deeptalk_edge.training.model import DeepTalk

REAL_CONFIG = {
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "mm_audio_encoder": "whisper-medium",
    "mm_audio_encoder_type": "whisper",
    "mm_audio_num_codebook": 7,
    "mm_audio_encoder_hidden_size": 1024,
    "mm_audio_projector_hidden_size": 7168,
    "mm_audio_projector_type": "linear",
    "vocab_size": 131584,
    "text_vocab_size": 102400,
    "text_special_tokens": 64,
    "text_vocab_size_padded": 102464,
    "audio_vocab_size": 4096,
    "audio_special_tokens": 64,
    "audio_vocab_size_padded": 4160,
    "text_additional_tokens": {"EOT": 102400, "PAD_T": 102401},
    "audio_additional_tokens": {"EOA": 4096, "PAD_A": 4097, "BOA": 4098},
    "tune_text_embed": True,
    "post_tts_adapter": False,
}

WHISPER_MEDIUM = {
    "num_mel_bins": 80,
    "d_model": 1024,
    "encoder_layers": 24,
    "encoder_attention_heads": 16,
    "encoder_ffn_dim": 4096,
    "max_source_positions": 1500,
}


def _real_table() -> dict[str, tuple[int, ...]]:
    table: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (131584, 2048),
        "lm_head.weight": (131584, 2048),
        "model.norm.weight": (2048,),
        "model.audio_encoder.conv1.weight": (1024, 80, 3),
        "model.audio_encoder.conv1.bias": (1024,),
        "model.audio_encoder.conv2.weight": (1024, 1024, 3),
        "model.audio_encoder.conv2.bias": (1024,),
        "model.audio_encoder.embed_positions.weight": (1500, 1024),
        "model.audio_encoder.layer_norm.weight": (1024,),
        "model.audio_encoder.layer_norm.bias": (1024,),
        "model.audio_mm_projector.fc_1.weight": (7168, 1024),
        "model.audio_mm_projector.fc_2.weight": (7168, 1024),
        "model.audio_mm_projector.proj.weight": (2048, 7168),
        "model.layers.0.mlp.gate_proj.weight": (10944, 2048),
        "model.layers.0.mlp.up_proj.weight": (10944, 2048),
        "model.layers.0.mlp.down_proj.weight": (2048, 10944),
    }
    for n in range(27):
        layer = f"model.layers.{n}"
        table[f"{layer}.input_layernorm.weight"] = (2048,)
        table[f"{layer}.post_attention_layernorm.weight"] = (2048,)
        table[f"{layer}.self_attn.q_proj.weight"] = (3072, 2048)
        table[f"{layer}.self_attn.kv_a_proj_with_mqa.weight"] = (576, 2048)
        table[f"{layer}.self_attn.kv_a_layernorm.weight"] = (512,)
        table[f"{layer}.self_attn.kv_b_proj.weight"] = (4096, 512)
        table[f"{layer}.self_attn.o_proj.weight"] = (2048, 2048)
    for n in range(1, 27):
        mlp = f"model.layers.{n}.mlp"
        table[f"{mlp}.gate.weight"] = (64, 2048)
        table[f"{mlp}.shared_experts.gate_proj.weight"] = (2816, 2048)
        table[f"{mlp}.shared_experts.up_proj.weight"] = (2816, 2048)
        table[f"{mlp}.shared_experts.down_proj.weight"] = (2048, 2816)
        for e in range(64):
            table[f"{mlp}.experts.{e}.gate_proj.weight"] = (1408, 2048)
            table[f"{mlp}.experts.{e}.up_proj.weight"] = (1408, 2048)
            table[f"{mlp}.experts.{e}.down_proj.weight"] = (2048, 1408)
    for n in range(24):
        layer = f"model.audio_encoder.layers.{n}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            table[f"{layer}.self_attn.{name}.weight"] = (1024, 1024)
        for name in ("q_proj", "v_proj", "out_proj"):
            table[f"{layer}.self_attn.{name}.bias"] = (1024,)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            table[f"{layer}.{name}.weight"] = (1024,)
            table[f"{layer}.{name}.bias"] = (1024,)
        table[f"{layer}.fc1.weight"] = (4096, 1024)
        table[f"{layer}.fc1.bias"] = (4096,)
        table[f"{layer}.fc2.weight"] = (1024, 4096)
        table[f"{layer}.fc2.bias"] = (1024,)
    return table


@pytest.fixture
def real_spec(tmp_path: Path) -> ModelSpec:
    for directory, config in (
        (tmp_path, REAL_CONFIG),
        (tmp_path / "whisper-medium", WHISPER_MEDIUM),
    ):
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
    return read_model_spec(tmp_path)


def test_the_real_config_gives_the_released_names_and_shapes(real_spec: ModelSpec) -> None:
    with torch.device("meta"):
        state = DeepTalk(real_spec).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == _real_table()
    expected = {**expected_tensors(real_spec), "lm_head.weight": (131584, 2048)}
    assert expected == _real_table()
    decoder = [name for name in expected_tensors(real_spec) if ".audio_" not in name]
    assert sum(state[name].numel() for name in decoder) / 1e9 == pytest.approx(15.557, abs=1e-3)


def test_the_real_config_survives_writing_and_reading(real_spec: ModelSpec) -> None:
    ours = config_of(real_spec)
    shared = REAL_CONFIG.keys() - {"model_type", "mm_audio_encoder"}
    assert {key: ours[key] for key in shared} == {key: REAL_CONFIG[key] for key in shared}


def test_moextend_adds_its_experts_to_the_count(real_spec: ModelSpec, tmp_path: Path) -> None:
    moextend = {"model_type": "moextend-deepseek_v2", "audio_num_experts": 16}
    (tmp_path / "config.json").write_text(json.dumps({**REAL_CONFIG, **moextend}))
    more = replace(real_spec, decoder=replace(real_spec.decoder, num_experts=80))
    assert read_model_spec(tmp_path) == more
