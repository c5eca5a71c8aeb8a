"""Adapters: zero at first, their product when merged, and files that fit or are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.training.checkpoint import load_model
from deeptalk_edge.training.lora import (
    adapters,
    add_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.stages.merge import merge
from tests.specs import PLAIN
from tests.training.random_models import random_model, random_rows
from tests.training.toys import SPEC, write_toy_checkpoint

NAMES = [
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.experts.3.down_proj.weight",
    "model.layers.2.mlp.shared_experts.up_proj.weight",
]

WIDER = replace(PLAIN, decoder=replace(PLAIN.decoder, expert_ffn_width=12))


def _with_adapters(seed: int = 0) -> DeepTalk:
    model = random_model(SPEC, seed)
    assert add_adapters(model, NAMES, rank=2, alpha=4.0) == 3
    for _, layer in adapters(model):
        torch.nn.init.normal_(layer.lora_b)
    return model


def test_a_new_adapter_changes_nothing_and_keeps_the_official_names() -> None:
    model, rows = random_model(PLAIN), random_rows(PLAIN, 2, 5)
    names, before = set(dict(model.named_parameters())), model(rows)
    add_adapters(model, NAMES, rank=2, alpha=4.0)
    assert torch.equal(model(rows), before)
    added = set(dict(model.named_parameters())) - names
    assert added == {
        f"{name.removesuffix('weight')}lora_{letter}" for name in NAMES for letter in "ab"
    }


def test_a_merged_weight_is_the_sum_of_weight_and_adapter() -> None:
    model = _with_adapters()
    rows = random_rows(SPEC, 2, 5)
    expected = model(rows)
    assert not torch.allclose(expected, random_model(SPEC)(rows), atol=1e-3)
    merge_adapters(model)
    assert not list(adapters(model))
    torch.testing.assert_close(model(rows), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_goes_through_a_file_and_merges_into_its_checkpoint(tmp_path: Path) -> None:
    checkpoint, model = write_toy_checkpoint(tmp_path / "checkpoint"), _with_adapters()
    save_adapter(model, tmp_path / "adapter", str(checkpoint))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4.0)
    merge(checkpoint, tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    rows = random_rows(SPEC, 2, 5)
    merged = load_model(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(rows), model(rows), rtol=1e-4, atol=1e-4)


def test_an_adapter_of_another_model_is_refused_by_the_tensors_name(tmp_path: Path) -> None:
    save_adapter(_with_adapters(), tmp_path, "elsewhere")
    with pytest.raises(ArtifactError, match=r"experts\.3\.down_proj\.lora_A.*expected"):
        load_adapter(random_model(WIDER), tmp_path)
