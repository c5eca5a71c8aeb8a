"""A published checkpoint is the trained model, and other files in its folder stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from deeptalk_edge.files import sha256_of
from deeptalk_edge.training.checkpoint import load_model
from deeptalk_edge.training.tiny.publish import publish
from tests.places import TINY

SHIPPED = TINY


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The shipped checkpoint, published once more over a directory with a model card."""
    place = tmp_path / "again"
    place.mkdir()
    (place / "README.md").write_text("the card", encoding="utf-8")
    (place / "config.json").write_text("{}", encoding="utf-8")
    publish(
        load_model(SHIPPED),
        Tokenizer.from_file(str(SHIPPED / "tokenizer.json")),
        json.loads((SHIPPED / "audio_experts.json").read_text(encoding="utf-8")),
        SHIPPED / "snac",
        SHIPPED / "codec_encoder.safetensors",
        place,
    )
    return place


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "audio_experts.json"]
)
def test_publishing_again_changes_nothing(published: Path, name: str) -> None:
    assert sha256_of(published / name) == sha256_of(SHIPPED / name)


def test_the_model_card_stays(published: Path) -> None:
    assert (published / "README.md").read_text(encoding="utf-8") == "the card"
