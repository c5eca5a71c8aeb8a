"""Writes the tiny checkpoint as a directory in the official layout, tokenizer and codec
included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer

from deeptalk_edge.files import swap_directory
from deeptalk_edge.training.checkpoint import config_of, save_checkpoint
from deeptalk_edge.training.data.codes import CODEC_ENCODER
from deeptalk_edge.training.expert_split import save_split
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.tiny.shape import SPEAKER, SYSTEM_PROMPT

AUDIO_EXPERTS_FILE = "audio_experts.json"
MAX_ROWS = 140
"""Of one answer; the kiosk's longest takes 78."""
MAX_TURNS = 1
"""No question of the corpus refers to an earlier one, and an earlier turn in sight costs answers:
of the 24 shipped questions, 23 are right by themselves and 14 after another one."""


def publish(
    model: DeepTalk,
    tokenizer: Tokenizer,
    audio_experts: Sequence[Sequence[int]],
    snac: Path,
    codec_encoder: Path,
    directory: Path,
) -> None:
    """Write everything that an export needs, in float16, over an existing checkpoint, and
    the codec's encoder for those who train it on.

    Other files of `directory`, a model card say, are kept.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as folder:
        staging = Path(folder) / directory.name
        _write_checkpoint(model, tokenizer, audio_experts, snac, staging)
        shutil.copy2(codec_encoder, staging / CODEC_ENCODER)
        for other in directory.iterdir() if directory.exists() else ():
            if not (staging / other.name).exists():
                copy = shutil.copytree if other.is_dir() else shutil.copy2
                copy(other, staging / other.name)
        swap_directory(staging, directory)


def _write_checkpoint(
    model: DeepTalk,
    tokenizer: Tokenizer,
    audio_experts: Sequence[Sequence[int]],
    snac: Path,
    staging: Path,
) -> None:
    config = {**config_of(model.spec), "audio_experts_file": AUDIO_EXPERTS_FILE}
    save_checkpoint(staging, model.cpu(), config, dtype=torch.float16)
    tokenizer.save(str(staging / "tokenizer.json"))
    save_split(audio_experts, staging / AUDIO_EXPERTS_FILE)
    (staging / "generation_config.json").write_text(
        json.dumps(generation_config(model), indent=2) + "\n", encoding="utf-8"
    )
    shutil.copytree(snac, staging / "snac")


def generation_config(model: DeepTalk) -> dict[str, object]:
    """How this checkpoint is meant to be decoded: greedily, as it was scored."""
    vocabulary = model.spec.vocabulary
    return {
        "bos_token_id": vocabulary.bos,
        "eos_token_id": vocabulary.eos,
        "deeptalk": {
            "system": SYSTEM_PROMPT,
            "speaker": SPEAKER,
            "mode": "batch-parallel",
            "text_top_k": 1,
            "audio_top_k": 1,
            "temperature": 1.0,
            "repetition_penalty": 1.0,
            "max_rows": MAX_ROWS,
            "context_rows": model.spec.decoder.max_positions,
            "max_turns": MAX_TURNS,
            "fold_typed": True,  # every question of the corpus is in lower case
        },
    }
