"""A small random checkpoint for the runtime's tests: odd sizes, bytes as text ids, a small SNAC."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deeptalk_edge.spec import CodecSpec, EncoderSpec, ModelSpec, VocabularySpec
from deeptalk_edge.training.checkpoint import config_of, save_checkpoint
from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.snac_files import save_snac
from tests.specs import DECODER
from tests.training.models import random_model

AUDIO_ID, BOS, EOS = 256, 257, 258

SPEC = ModelSpec(
    decoder=DECODER,
    encoder=EncoderSpec(
        num_mel_bins=10, width=12, num_layers=1, num_heads=3, ffn_width=20, max_frames=100
    ),
    projector_width=18,
    vocabulary=VocabularySpec(
        text_size=320,
        num_codebooks=7,
        codebook_size=32,
        codebook_block=48,
        bos=BOS,
        eos=EOS,
        text_specials={"EOT": 300, "PAD_T": 301},
        audio_specials={"EOA": 32, "PAD_A": 33, "BOA": 34, "ANS_A": 35},
    ),
)

CODEC = CodecSpec(
    sampling_rate=24000,
    encoder_dim=4,
    encoder_rates=(2, 4, 8, 8),
    latent_dim=20,
    decoder_dim=32,
    decoder_rates=(8, 8, 4, 2),
    codebook_size=32,
    codebook_dim=6,
    vq_strides=(4, 2, 1),
    noise=True,
    depthwise=True,
)


def write_checkpoint(directory: Path) -> None:
    """A whole checkpoint: decoder, encoder, SNAC, tokenizer, generation defaults."""
    save_checkpoint(directory, random_model(SPEC), config_of(SPEC))
    torch.manual_seed(1)
    save_snac(Snac(CODEC), directory / "snac")
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    chosen = {
        "system": "Be brief.",
        "max_rows": 24,
        "context_rows": 400,
        "audio_top_k": 1,
        "repetition_penalty": 1.0,
    }
    (directory / "generation_config.json").write_text(
        json.dumps({"deeptalk": chosen}), encoding="utf-8"
    )


def byte_level_tokenizer() -> Tokenizer:
    """An id is a byte: every character beyond ASCII takes several ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    # GPT-2's alphabet: printable bytes stand for themselves, the others for characters from 256 on.
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|audio|>", "<bos>", "<eos>")]
    )
    return tokenizer
