"""The sizes of the tiny checkpoint: the official structure at a thousandth of its weight."""

from __future__ import annotations

from tokenizers import Tokenizer

from deeptalk_edge.model.prompt import AUDIO_TOKEN, Template
from deeptalk_edge.model.spec import (
    CodecSpec,
    DecoderSpec,
    EncoderSpec,
    ModelSpec,
    TextAlignment,
    VocabularySpec,
    YarnSpec,
)
from deeptalk_edge.training.tiny.tokenizer import BOS, EOS, encode, special_id

SYSTEM_PROMPT = "You are the kiosk of a railway station."
SPEAKER = "ANS_A"
NUM_SPECIALS = 64

TEXT_SPECIALS = ("EOT", "PAD_T", "BOT", "ANS_T", "TTS", "TQA", "TQAA")
AUDIO_SPECIALS = ("EOA", "PAD_A", "BOA", "ANS_A", "ASR", "AQA", "AQAA", "M29", "F10", "ER")
"""In the order of the official training scripts."""

AUDIO_EXPERT_COUNTS = (3, 4, 3)
"""Audio experts of each MoE layer; unequal on purpose, as the format allows."""

ENCODER = EncoderSpec(
    num_mel_bins=80, width=192, num_layers=4, num_heads=4, ffn_width=768, max_frames=500
)
DECODER = DecoderSpec(
    width=192,
    num_layers=4,
    num_heads=4,
    nope_dim=32,
    rope_dim=16,
    value_dim=32,
    latent_dim=64,
    dense_ffn_width=512,
    expert_ffn_width=160,
    num_experts=8,
    num_shared_experts=2,
    top_k=2,
    num_dense_layers=1,
    norm_eps=1e-6,
    rope_theta=10_000.0,
    max_positions=4096,
    yarn=YarnSpec(
        factor=4.0,
        original_positions=1024,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=0.707,
        mscale_all_dim=0.707,
    ),
)
PROJECTOR_WIDTH = 384


def tiny_spec(
    tokenizer: Tokenizer,
    codec: CodecSpec,
    alignment: TextAlignment,
    decoder: DecoderSpec = DECODER,
) -> ModelSpec:
    """The whole model; the vocabulary's size follows from the tokenizer and the codec."""
    text_size = -(-tokenizer.get_vocab_size() // NUM_SPECIALS) * NUM_SPECIALS
    return ModelSpec(
        decoder=decoder,
        encoder=ENCODER,
        projector_width=PROJECTOR_WIDTH,
        vocabulary=VocabularySpec(
            text_size=text_size + NUM_SPECIALS,
            num_codebooks=codec.frame_codes,
            codebook_size=codec.codebook_size,
            codebook_block=codec.codebook_size + NUM_SPECIALS,
            bos=special_id(tokenizer, BOS),
            eos=special_id(tokenizer, EOS),
            text_specials={name: text_size + i for i, name in enumerate(TEXT_SPECIALS)},
            audio_specials={name: codec.codebook_size + i for i, name in enumerate(AUDIO_SPECIALS)},
        ),
        text_alignment=alignment,
    )


def tiny_template(spec: ModelSpec, tokenizer: Tokenizer) -> Template:
    """Writes the prompts of this checkpoint."""
    return Template(
        vocabulary=spec.vocabulary,
        audio_id=special_id(tokenizer, AUDIO_TOKEN),
        encode=lambda text: encode(tokenizer, text),
    )
