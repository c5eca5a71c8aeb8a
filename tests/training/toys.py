"""A toy checkpoint on disk, and data for it: every recipe runs on them in a second."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from deeptalk_edge.model.spec import EncoderSpec, ModelSpec, VocabularySpec
from deeptalk_edge.sound.wav import WavWriter
from deeptalk_edge.training.checkpoint import config_of, save_checkpoint
from deeptalk_edge.training.expert_split import save_split
from deeptalk_edge.training.tiny.tokenizer import BOS, EOS, special_id, train_tokenizer
from tests.specs import DECODER, PLAIN
from tests.training.random_models import random_model

WORDS = ("where", "is", "gate", "one", "two", "left", "right")
SPLIT = [[0, 1], [2, 3, 4]]
CODEBOOK = 32

_TOKENIZER = train_tokenizer(WORDS, ["You are a toy."])
_TEXT_SIZE = _TOKENIZER.get_vocab_size()

SPEC: ModelSpec = replace(
    PLAIN,
    decoder=replace(DECODER, num_experts=5, top_k=2),
    encoder=EncoderSpec(
        num_mel_bins=80, width=12, num_layers=1, num_heads=3, ffn_width=20, max_frames=32
    ),
    vocabulary=VocabularySpec(
        text_size=_TEXT_SIZE + 8,
        num_codebooks=7,
        codebook_size=CODEBOOK,
        codebook_block=CODEBOOK + 16,
        bos=special_id(_TOKENIZER, BOS),
        eos=special_id(_TOKENIZER, EOS),
        text_specials={"EOT": _TEXT_SIZE, "PAD_T": _TEXT_SIZE + 1},
        audio_specials={
            "EOA": CODEBOOK,
            "PAD_A": CODEBOOK + 1,
            "BOA": CODEBOOK + 2,
            "ANS_A": CODEBOOK + 3,
            "ASR": CODEBOOK + 4,
        },
    ),
)


def write_toy_checkpoint(directory: Path, seed: int = 0) -> Path:
    """A random model with tokenizer and split."""
    config = {**config_of(SPEC), "audio_experts_file": "audio_experts.json"}
    save_checkpoint(directory, random_model(SPEC, seed), config)
    _TOKENIZER.save(str(directory / "tokenizer.json"))
    save_split(SPLIT, directory / "audio_experts.json")
    return directory


def write_toy_data(directory: Path, count: int = 12, seed: int = 0) -> Path:
    """Spoken and typed questions with answers in text and codes, as JSONL."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    noise = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        wav = directory / f"q{i}.wav"
        writer = WavWriter(wav, 16000)
        writer.write(noise.normal(0, 0.1, 320 * draw.randint(8, 20)).astype(np.float32))
        writer.close()
        question, answer = (
            " ".join(draw.choice(WORDS) for _ in range(n)) for n in (3, draw.randint(1, 4))
        )
        codes = [draw.randrange(CODEBOOK) for _ in range(7 * draw.randint(2, 5))]
        user = {"role": "user", "content": question, "wavpath": wav.name}
        spoken = {"role": "assistant", "content": answer, "codec": codes}
        lines.append(json.dumps({"conversations": [user, spoken]}))
    path = directory / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_toy_pairs(directory: Path, count: int = 6, seed: int = 1) -> Path:
    """Questions with a better and a worse answer."""
    path = write_toy_data(directory, count, seed)
    draw, pairs = random.Random(seed), []
    for line in path.read_text().splitlines():
        item = json.loads(line)
        del item["conversations"][-1]["codec"]
        for name in ("win_codec", "lose_codec"):
            item[name] = [draw.randrange(CODEBOOK) for _ in range(7 * draw.randint(2, 5))]
        pairs.append(json.dumps(item))
    path.write_text("\n".join(pairs) + "\n", encoding="utf-8")
    return path


def recipe_changes(checkpoint: Path, data: Path, output: Path, task: str = "RQACONVA") -> list[str]:
    """`--set` words that make one of our recipes a toy run of six steps."""
    return [
        f"checkpoint={checkpoint}",
        f"output={output}",
        f'data.train=[{{path = "{data}", task = "{task}"}}]',
        "data.batch_size=4",
        "data.accumulation=2",
        "optimiser.num_steps=6",
        "optimiser.learning_rate=1e-2",
        "saving.every=2",
        "precision=float32",
    ]


def parameters_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    from deeptalk_edge.training.checkpoint import load_model

    return {name: p.detach() for name, p in load_model(checkpoint).named_parameters()}
