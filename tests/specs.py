"""Small models for tests: each is unusual in another way, and all sizes of a model differ."""

from __future__ import annotations

from dataclasses import replace

from deeptalk_edge.bundle.expert_record import ExpertDtype
from deeptalk_edge.model.spec import (
    DecoderSpec,
    EncoderSpec,
    ModelSpec,
    VocabularySpec,
    YarnSpec,
)

VOCABULARY = VocabularySpec(
    text_size=40,
    num_codebooks=7,
    codebook_size=32,
    codebook_block=48,
    bos=30,
    eos=31,
    text_specials={"EOT": 34, "PAD_T": 35, "BOT": 36},
    audio_specials={"EOA": 32, "PAD_A": 33, "BOA": 34, "ANS_A": 35, "M29": 39, "F10": 40},
)

ENCODER = EncoderSpec(
    num_mel_bins=10, width=12, num_layers=2, num_heads=3, ffn_width=20, max_frames=16
)

DECODER = DecoderSpec(
    width=24,
    num_layers=3,
    num_heads=4,
    nope_dim=6,
    rope_dim=4,
    value_dim=10,
    latent_dim=14,
    dense_ffn_width=36,
    expert_ffn_width=8,
    num_experts=5,
    num_shared_experts=2,
    top_k=2,
    num_dense_layers=1,
    norm_eps=1e-6,
    rope_theta=10_000.0,
    max_positions=4096,
)

YARN = YarnSpec(
    factor=40, original_positions=64, beta_fast=32, beta_slow=1, mscale=0.9, mscale_all_dim=0.707
)
"""The two scales differ, so that the factor on cos and sin is not 1."""

PLAIN = ModelSpec(decoder=DECODER, encoder=ENCODER, projector_width=18, vocabulary=VOCABULARY)

SPECS = {
    "plain": PLAIN,
    "yarn": replace(PLAIN, decoder=replace(DECODER, rope_dim=8, rope_theta=100.0, yarn=YARN)),
    "two dense layers, top 3, large epsilon": replace(
        PLAIN,
        decoder=replace(
            DECODER,
            num_layers=4,
            num_dense_layers=2,
            num_experts=7,
            top_k=3,
            routed_scale=2.5,
            norm_eps=0.1,
        ),
    ),
    "wide values, three shared experts": replace(
        PLAIN,
        decoder=replace(DECODER, nope_dim=8, rope_dim=2, value_dim=14, num_shared_experts=3),
    ),
    "normalised in spite of a scale, no shared experts, an untied head": replace(
        PLAIN,
        decoder=replace(DECODER, normalise_top_k=True, routed_scale=2.5, num_shared_experts=0),
        tied_head=False,
    ),
    "top 1, scaled in spite of a norm": replace(
        PLAIN, decoder=replace(DECODER, normalise_top_k=True, routed_scale=2.5, top_k=1)
    ),
}

SNAC_CONFIG = {
    "sampling_rate": 24000,
    "encoder_dim": 48,
    "encoder_rates": [2, 4, 8, 8],
    "decoder_dim": 1024,
    "decoder_rates": [8, 8, 4, 2],
    "attn_window_size": None,
    "codebook_size": 4096,
    "codebook_dim": 8,
    "vq_strides": [4, 2, 1],
    "noise": True,
    "depthwise": True,
}
"""The sizes in the released codec's config.json."""

RECORD_KINDS: list[tuple[ExpertDtype, int | None]] = [
    ("float32", None),
    ("float16", None),
    ("bfloat16", None),
    ("int8", None),
    ("int4", 32),
    ("int4", 64),
    ("int4", 128),
]
"""Every form of an expert's record: its dtype, and the number of columns that share a scale."""
