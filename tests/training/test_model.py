"""The torch model against independent ones: transformers' DeepSeek-V2 and Whisper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from deeptalk_edge.model.spec import DecoderSpec, ModelSpec
from deeptalk_edge.training.attention import (
    LatentAttention,
    absorbed_attention,
    dot_product_attention,
    expanded_attention,
    rotary_turns,
)
from deeptalk_edge.training.checkpoint import config_of, encoder_config_of, save_checkpoint
from deeptalk_edge.training.experts import STRETCH, MixtureOfExperts
from deeptalk_edge.training.model import Cache, DeepTalk, Routing, align_features
from tests.specs import PLAIN, SPECS
from tests.training.random_models import random_model, random_rows

TOLERANCE = 1e-4  # float32 through a few layers, on logits of some units

every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


@pytest.mark.parametrize(
    "spec",
    # transformers 5 never reads `norm_topk_prob`: DeepSeek's own gate is in test_router.py.
    [pytest.param(s, id=name) for name, s in SPECS.items() if not s.decoder.normalise_top_k],
)
def test_the_decoder_equals_transformers_deepseek_v2(spec: ModelSpec, tmp_path: Path) -> None:
    model = random_model(spec)
    save_checkpoint(tmp_path / "checkpoint", model, config_of(spec))
    theirs = _transformers_decoder(spec.decoder, spec, tmp_path / "checkpoint")
    embedded = model.embed(random_rows(spec, 2, 70))
    with torch.no_grad():
        expected = theirs(inputs_embeds=embedded).logits
        hidden = model.decode(embedded)
        found = torch.cat([model.text_logits(hidden), model.code_logits(hidden).flatten(2)], -1)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def _transformers_decoder(decoder: DecoderSpec, spec: ModelSpec, checkpoint: Path) -> Any:
    """DeepSeek-V2 of transformers, reading the checkpoint that we wrote."""
    fields = config_of(spec)
    rope = fields.pop("rope_scaling") or {"type": "default"}
    rope = {"rope_type": rope.pop("type"), "rope_theta": decoder.rope_theta, **rope}
    config = DeepseekV2Config(
        **{**fields, "model_type": "deepseek_v2"}, rope_parameters=rope, mlp_bias=False
    )
    config._attn_implementation = "eager"
    deepseek: Any = DeepseekV2ForCausalLM
    theirs, report = deepseek.from_pretrained(
        checkpoint, config=config, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] - {"lm_head.weight"}
    return theirs.eval()


@every_spec
def test_the_encoder_equals_transformers_whisper(spec: ModelSpec) -> None:
    model = random_model(spec)
    config = WhisperConfig(**encoder_config_of(spec.encoder))
    theirs: Any = WhisperEncoder(config)
    theirs.eval()
    theirs.load_state_dict(model.model.audio_encoder.state_dict())
    log_mel = torch.randn(2, spec.encoder.num_mel_bins, 2 * spec.encoder.max_frames)
    with torch.no_grad():
        expected = theirs(log_mel).last_hidden_state
        found = model.model.audio_encoder(log_mel)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_the_encoder_starts_with_whispers_own_positions() -> None:
    theirs = WhisperEncoder(WhisperConfig(**encoder_config_of(PLAIN.encoder)))
    ours = DeepTalk(PLAIN).model.audio_encoder
    torch.testing.assert_close(ours.embed_positions.weight, theirs.embed_positions.weight)


def test_a_window_of_another_size_is_refused() -> None:
    bins, mel_frames = PLAIN.encoder.num_mel_bins, 2 * PLAIN.encoder.max_frames
    with pytest.raises(ValueError, match="pad it to the whole window"):
        DeepTalk(PLAIN).encode(torch.zeros(1, bins, mel_frames - 2))


@every_spec
def test_cached_decoding_equals_the_full_forward(spec: ModelSpec) -> None:
    model = random_model(spec)
    rows = random_rows(spec, 3, 11)
    cache = Cache()
    with torch.no_grad():
        full = model(rows)
        parts = [model(part, cache=cache) for part in torch.split(rows, [5, 1, 1, 3, 1], dim=1)]
    assert cache.num_rows == 11
    torch.testing.assert_close(torch.cat(parts, dim=1), full, atol=TOLERANCE, rtol=0)


def test_padding_on_the_right_changes_nothing_before_it() -> None:
    model = random_model(PLAIN)
    rows = random_rows(PLAIN, 1, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(rows)[:, :6], model(rows[:, :6]))


@every_spec
@pytest.mark.parametrize("num_rows", [1, 4, 9])
def test_absorbed_attention_equals_expanded_attention(spec: ModelSpec, num_rows: int) -> None:
    decoder = spec.decoder
    attention = random_model(spec).model.layers[0].self_attn
    assert isinstance(attention, LatentAttention)
    hidden = torch.randn(2, 9, decoder.width)
    turns = rotary_turns(decoder, 0, 9, hidden.device)
    latents = attention.latents(hidden, turns)
    queries = attention.queries(hidden, turns)[:, -num_rows:]
    expanded = expanded_attention(attention, queries, latents)
    assert expanded.shape == (2, num_rows, decoder.num_heads, decoder.value_dim)
    absorbed = absorbed_attention(attention, queries, latents)
    torch.testing.assert_close(absorbed, expanded, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("num_rows", "num_keys"), [(7, 7), (3, 7), (1, 7)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_explicit_attention_equals_torchs_fused_attention(
    num_rows: int, num_keys: int, is_causal: bool
) -> None:
    query, key = torch.randn(2, 3, num_rows, 12), torch.randn(2, 3, num_keys, 12)
    value = torch.randn(2, 3, num_keys, 5)
    seen = torch.ones(num_rows, num_keys, dtype=torch.bool)
    if is_causal:
        seen = seen.tril(num_keys - num_rows)
    expected = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3)
    found = dot_product_attention(query, key, value, 0.3, is_causal=is_causal)
    torch.testing.assert_close(found, expected)


def test_an_expert_runs_on_few_distinct_lengths() -> None:
    """Otherwise training spends most of its time compiling products."""
    spec = PLAIN.decoder
    mixture = MixtureOfExperts(spec)
    lengths: list[int] = []
    for expert in mixture.experts:
        expert.register_forward_hook(lambda _, args, __: lengths.append(len(args[0])))
    mixture(torch.randn(1, 50, spec.width))
    assert sum(lengths) >= 50 * spec.top_k
    assert all(length % STRETCH == 0 for length in lengths)


def test_the_cache_keeps_one_latent_and_one_rotary_key_a_row() -> None:
    cache = Cache()
    random_model(PLAIN)(random_rows(PLAIN, 2, 3), cache=cache)
    more = torch.zeros(2, 1, PLAIN.decoder.cache_width)
    assert cache.extend(0, more).shape == (2, 4, PLAIN.decoder.cache_width)


def _picks(kind: str, num_experts: int, top_k: int) -> Tensor:
    """Ids (12, top_k): random, never expert 0, or expert 3 first for every token."""
    scores = torch.rand(12, num_experts)
    if kind == "one expert idle":
        scores[:, 0] = -1
    if kind == "one expert for all":
        scores[:, 3] = 2
        top_k = 1
    return scores.topk(top_k).indices


@pytest.mark.parametrize("kind", ["random", "one expert idle", "one expert for all"])
def test_sorted_experts_equal_a_loop_over_tokens(kind: str) -> None:
    mixture = random_model(PLAIN).model.layers[-1].mlp
    assert isinstance(mixture, MixtureOfExperts)
    tokens = torch.randn(12, PLAIN.decoder.width)
    ids = _picks(kind, PLAIN.decoder.num_experts, PLAIN.decoder.top_k)
    weights = torch.rand(ids.shape)
    found = mixture.routed(tokens, weights, ids)
    for n, token in enumerate(tokens):
        expected = torch.zeros_like(token)
        for k in range(ids.shape[1]):
            expected += weights[n, k] * mixture.experts[int(ids[n, k])](token)
        torch.testing.assert_close(found[n], expected, atol=1e-5, rtol=0)


def test_chosen_weights_are_not_normalised() -> None:
    routing: list[Routing] = []
    model = random_model(PLAIN)
    model(random_rows(PLAIN, 2, 5), routing=routing)
    assert [r.layer for r in routing] == list(PLAIN.decoder.moe_layers)
    mixture = model.model.layers[-1].mlp
    assert isinstance(mixture, MixtureOfExperts)
    probabilities, weights, ids = mixture.gate(torch.randn(6, PLAIN.decoder.width))
    torch.testing.assert_close(weights, probabilities.gather(-1, ids))
    assert (weights.sum(-1) < 1).all()


def test_the_router_stays_in_float32_in_a_half_precision_model() -> None:
    model = random_model(PLAIN).to(torch.bfloat16)
    routing: list[Routing] = []
    hidden = model(random_rows(PLAIN, 1, 4), routing=routing)
    assert hidden.dtype == torch.bfloat16
    assert routing[0].probabilities.dtype == torch.float32


FROZEN = [[0, 4], [1, 2, 3]]


def test_a_frozen_expert_gets_no_token_and_the_rest_all_the_probability() -> None:
    model = random_model(PLAIN)
    model.set_barred_experts(FROZEN)
    routing: list[Routing] = []
    model(random_rows(PLAIN, 2, 30), routing=routing)
    for layer, barred in zip(routing, FROZEN, strict=True):
        assert (layer.probabilities[..., barred] == 0).all()
        torch.testing.assert_close(layer.probabilities.sum(-1), torch.ones(2, 30))
        assert not torch.isin(layer.expert_ids, torch.tensor(barred)).any()


def test_a_stage_trains_all_experts_but_the_frozen_ones() -> None:
    model = random_model(PLAIN)
    model.set_barred_experts(FROZEN)
    model(random_rows(PLAIN, 4, 30)).square().sum().backward()
    for layer, barred in zip(PLAIN.decoder.moe_layers, FROZEN, strict=True):
        mixture = model.model.layers[layer].mlp
        assert isinstance(mixture, MixtureOfExperts)
        trained = [
            i
            for i, expert in enumerate(mixture.experts)
            if any(p.grad is not None and p.grad.any() for p in expert.parameters())
        ]
        assert trained == [i for i in range(PLAIN.decoder.num_experts) if i not in barred]
        assert mixture.gate.weight.grad is not None


def test_releasing_barred_experts_restores_the_logits() -> None:
    model = random_model(PLAIN)
    rows = random_rows(PLAIN, 1, 8)
    before = model(rows)
    model.set_barred_experts(FROZEN)
    assert not torch.equal(model(rows), before)
    model.set_barred_experts(None)
    assert torch.equal(model(rows), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        ([[0]], "1 lists of experts for 2 MoE layers"),
        ([[0], [5]], "this model has 0 to 4"),
        ([[0], [0, 1, 2, 3]], "fewer than top_k = 2"),
    ],
)
def test_a_stage_that_does_not_fit_is_refused(frozen: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepTalk(PLAIN).set_barred_experts(frozen)


def test_frames_go_to_the_masked_rows_in_order() -> None:
    features = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])
    aligned = align_features(features, mask)[..., 0]
    assert aligned[0][mask[0]].tolist() == [0, 1, 2]
    assert aligned[1][mask[1]].tolist() == [4]


def test_head_and_embedding_are_one_parameter() -> None:
    model = DeepTalk(PLAIN)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.double().lm_head.weight is model.model.embed_tokens.weight
