"""The exporter's small random checkpoint, with a window of seconds and bytes as text ids."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.export import checkpoints
from tests.specs import ENCODER, PLAIN, VOCABULARY

BOS, EOS = 257, 258

SPEC = replace(
    PLAIN,
    encoder=replace(ENCODER, num_layers=1, max_frames=100),
    vocabulary=replace(
        VOCABULARY,
        text_size=320,
        bos=BOS,
        eos=EOS,
        text_specials={"EOT": 300, "PAD_T": 301},
        audio_specials={"EOA": 32, "PAD_A": 33, "BOA": 34, "ANS_A": 35},
    ),
)
CODEC = checkpoints.CODEC


def write_speaking_checkpoint(directory: Path) -> None:
    """A whole checkpoint, its tokenizer and generation defaults included."""
    checkpoints.write_checkpoint(directory, SPEC)
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
    # GPT-2's alphabet: printable bytes map to themselves, the others to characters from 256 on.
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + i): byte for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True) for t in ("<|audio|>", "<bos>", "<eos>")]
    )
    return tokenizer
