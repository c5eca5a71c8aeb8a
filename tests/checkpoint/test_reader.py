"""Checkpoints that we or others wrote are read, and damaged ones are refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deeptalk_edge.checkpoint.config import read_model_spec
from deeptalk_edge.checkpoint.reader import Checkpoint, CodecCheckpoint, expected_tensors
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.training.checkpoint import config_of, load_model, save_checkpoint
from tests.specs import PLAIN, SNAC_CONFIG, SPECS
from tests.training.random_models import random_model, random_rows

EMBEDDING = "model.embed_tokens.weight"
EXPERT = "model.layers.1.mlp.experts.4.up_proj.weight"


def _saved(directory: Path, spec: ModelSpec = PLAIN, **options: Any) -> Path:
    save_checkpoint(directory / "checkpoint", random_model(spec), config_of(spec), **options)
    return directory / "checkpoint"


def _edit_config(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_weights(checkpoint: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace tensors of an unsharded checkpoint; None takes one out."""
    tensors = {**load_file(checkpoint / "model.safetensors"), **changes}
    kept = {name: t.contiguous() for name, t in tensors.items() if t is not None}
    save_file(kept, checkpoint / "model.safetensors")


def _refusal(checkpoint: Path, **options: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        Checkpoint.open(checkpoint, **options)
    return str(caught.value)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_a_spec_survives_its_config_files(spec: ModelSpec, tmp_path: Path) -> None:
    assert read_model_spec(_saved(tmp_path, spec)) == spec


@pytest.mark.parametrize(
    "model_type",
    [
        "deepseek_v2",
        "vita-deepseek_v2",
        "lucy-deepseek_v2",
        "puremoe-deepseek_v2",
        "moextend-deepseek_v2",
    ],
)
def test_every_spelling_of_the_model_type_is_read(model_type: str, tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    _edit_config(checkpoint, model_type=model_type, audio_num_experts=0)
    assert Checkpoint.open(checkpoint).spec == PLAIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [10**9, 10_000])
def test_a_model_survives_its_checkpoint(
    dtype: torch.dtype, shard_bytes: int, tmp_path: Path
) -> None:
    model = random_model(PLAIN)
    save_checkpoint(tmp_path / "m", model, config_of(PLAIN), dtype=dtype, shard_bytes=shard_bytes)
    num_shards = len(list((tmp_path / "m").glob("*.safetensors")))
    assert (num_shards > 3) is (shard_bytes == 10_000)
    loaded = load_model(tmp_path / "m")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float()), name
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert json.loads((tmp_path / "m/config.json").read_text())["torch_dtype"] in str(dtype)


def test_no_shard_is_larger_than_asked(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path, shard_bytes=50_000)
    for shard in checkpoint.glob("*.safetensors"):
        assert sum(t.nbytes for t in load_file(shard).values()) <= 50_000


def test_tensors_come_one_by_one_as_float32_arrays_of_the_callers_own(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(_saved(tmp_path, dtype=torch.bfloat16))
    first, second = checkpoint.tensor(EXPERT), checkpoint.tensor(EXPERT)
    assert first.dtype == np.float32
    first[:] = 0
    assert second.any()


def test_an_existing_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    with pytest.raises(ArtifactError, match="exists; name another directory"):
        _saved(tmp_path)
    assert Checkpoint.open(checkpoint).spec == PLAIN


def test_a_run_that_dies_while_saving_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("deeptalk_edge.training.checkpoint.save_file", full_disk)
        with pytest.raises(OSError, match="no space"):
            _saved(tmp_path)
    assert not (tmp_path / "checkpoint").exists()
    assert Checkpoint.open(_saved(tmp_path)).spec == PLAIN  # and the next run can save


def test_what_released_checkpoints_add_is_left_out_with_one_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = _saved(tmp_path)
    extras = ("ref_model.norm.weight", "ref_lm_head.weight", "something.else")
    _edit_weights(checkpoint, {name: torch.ones(2, 3) for name in extras})
    with caplog.at_level(logging.INFO):
        assert Checkpoint.open(checkpoint).tensor(EXPERT).any()
    (record,) = caplog.records
    assert "left out 3 tensors: ref_lm_head.weight, ref_model" in record.getMessage()


def test_a_table_saved_only_as_the_tied_head_is_found(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    table = load_file(checkpoint / "model.safetensors")[EMBEDDING]
    _edit_weights(checkpoint, {EMBEDDING: None, "lm_head.weight": table})
    np.testing.assert_array_equal(Checkpoint.open(checkpoint).tensor(EMBEDDING), table)


def test_an_embedding_with_frozen_rows_is_joined(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    table = load_file(checkpoint / "model.safetensors")[EMBEDDING]
    split = {
        EMBEDDING: None,
        f"{EMBEDDING}_frozen": table[:30],
        f"{EMBEDDING}_unfrozen": table[30:],
    }
    _edit_weights(checkpoint, split)
    np.testing.assert_array_equal(Checkpoint.open(checkpoint).tensor(EMBEDDING), table)


@pytest.mark.parametrize("with_duplicates", [False, True])
def test_moextends_experts_are_one_list_text_first(with_duplicates: bool, tmp_path: Path) -> None:
    """Three text experts and two audio experts, stored apart, route as one model of five."""
    checkpoint = _saved(tmp_path)
    whole = load_model(checkpoint)
    tensors: dict[str, Tensor | None] = dict(load_file(checkpoint / "model.safetensors"))
    for name, tensor in list(tensors.items()):
        mlp, is_expert, rest = name.partition(".experts.")
        if is_expert and tensor is not None:
            number, _, rest = rest.partition(".")
            i = int(number)
            alias = f"text_experts.{i}" if i < 3 else f"audio_experts.{i - 3}"
            tensors[f"{mlp}.{alias}.{rest}"] = tensor.clone()
            tensors[name] = tensor if with_duplicates else None
        elif name.endswith("mlp.gate.weight") and tensor is not None:
            tensors[name] = tensor[:3]
            tensors[name.replace("weight", "audio_router_weight")] = tensor[3:]
    _edit_weights(checkpoint, tensors)
    _edit_config(
        checkpoint, model_type="moextend-deepseek_v2", n_routed_experts=3, audio_num_experts=2
    )
    rows = random_rows(PLAIN, 1, 6)
    assert torch.equal(load_model(checkpoint)(rows), whole(rows))


def test_missing_and_misshapen_tensors_are_named_with_both_shapes(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    _edit_weights(checkpoint, {EXPERT: None, "model.norm.weight": torch.ones(23)})
    message = _refusal(checkpoint)
    assert f"{EXPERT} is missing, expected [8, 24]" in message
    assert "model.norm.weight is [23] in model.safetensors, expected [24]" in message
    assert "no shard is missing" in message


def test_thousands_of_missing_tensors_make_a_short_message(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    save_file({"model.norm.weight": torch.ones(24)}, checkpoint / "model.safetensors")
    message = _refusal(checkpoint)
    assert f"{len(expected_tensors(PLAIN)) - 1 - 4} more" in message
    assert len(message) < 800


def test_a_tensor_of_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    _edit_weights(checkpoint, {EXPERT: torch.ones(8, 24, dtype=torch.int8)})
    assert f"{EXPERT} is stored as I8, not BF16 or F16 or F32" in _refusal(checkpoint)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path, shard_bytes=50_000)
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    message = _refusal(checkpoint)
    assert message.startswith(f"{shard}: truncated or damaged")
    assert "download the checkpoint again" in message


def test_a_shard_of_noise_is_refused(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    (checkpoint / "model.safetensors").write_bytes(bytes(range(256)) * 10)
    assert "truncated or damaged" in _refusal(checkpoint)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path, shard_bytes=50_000)
    sorted(checkpoint.glob("*.safetensors"))[1].unlink()
    assert "no such shard" in _refusal(checkpoint)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../a.safetensors"}}, "not a file in the index's folder"),
        ({"weight_map": {}}, "expected a weight_map"),
        ([], "expected a JSON object"),
    ],
)
def test_an_index_that_names_no_shards_here_is_refused(
    index: object, message: str, tmp_path: Path
) -> None:
    checkpoint = _saved(tmp_path)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in _refusal(checkpoint)


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    (checkpoint / "model.safetensors").unlink()
    assert "convert weights of another format" in _refusal(checkpoint)


def test_an_unknown_model_type_is_refused(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    _edit_config(checkpoint, model_type="llama")
    assert "'llama' is not a DeepTalk checkpoint" in _refusal(checkpoint)


UNTIED = replace(PLAIN, tied_head=False)
SAYS = {"absent": None, "true": True, "false": False}


def _with_stored_head(place: Path, head: str, tie: bool | None) -> Path:
    """A checkpoint with a stored head, which config.json calls tied, untied or nothing."""
    checkpoint = _saved(place)
    table = load_file(checkpoint / "model.safetensors")[EMBEDDING]
    heads = {"the same": table.clone(), "another": table.flip(0), "fewer rows": table[:40].clone()}
    _edit_weights(checkpoint, {"lm_head.weight": heads[head]})
    _edit_config(checkpoint, tie_word_embeddings=tie)
    if tie is None:
        path = checkpoint / "config.json"
        fields = json.loads(path.read_text())
        del fields["tie_word_embeddings"]
        path.write_text(json.dumps(fields))
    return checkpoint


@pytest.mark.parametrize("tie", SAYS.values(), ids=SAYS.keys())
def test_a_stored_head_that_is_the_embedding_is_tied_whatever_the_config_says(
    tie: bool | None, tmp_path: Path
) -> None:
    assert Checkpoint.open(_with_stored_head(tmp_path, "the same", tie)).spec == PLAIN


@pytest.mark.parametrize("tie", [None, True], ids=["absent", "true"])
def test_a_head_that_differs_is_refused_unless_the_config_says_so(
    tie: bool | None, tmp_path: Path
) -> None:
    message = _refusal(_with_stored_head(tmp_path, "another", tie))
    assert f"lm_head.weight differs from {EMBEDDING}" in message
    assert "set tie_word_embeddings to false" in message


def test_a_head_that_differs_is_untied_if_the_config_says_so(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(_with_stored_head(tmp_path, "another", False))
    assert checkpoint.spec == UNTIED
    table = checkpoint.tensor(EMBEDDING)
    np.testing.assert_array_equal(checkpoint.tensor("lm_head.weight"), table[::-1])


@pytest.mark.parametrize("tie", SAYS.values(), ids=SAYS.keys())
def test_a_head_of_another_shape_is_refused(tie: bool | None, tmp_path: Path) -> None:
    message = _refusal(_with_stored_head(tmp_path, "fewer rows", tie))
    assert "lm_head.weight is [40, 24] in model.safetensors, expected [376, 24]" in message


def test_an_untied_checkpoint_without_its_head_or_its_embedding_is_refused(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    _edit_config(checkpoint, tie_word_embeddings=False)
    assert "lm_head.weight is missing" in _refusal(checkpoint)
    table = load_file(checkpoint / "model.safetensors")[EMBEDDING]
    _edit_weights(checkpoint, {EMBEDDING: None, "lm_head.weight": table})
    assert f"{EMBEDDING} is missing" in _refusal(checkpoint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_head_is_compared_with_an_embedding_in_two_parts(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = _saved(tmp_path, dtype=dtype)
    table = load_file(checkpoint / "model.safetensors")[EMBEDDING]
    split = {"_frozen": table[:30].clone(), "_unfrozen": table[30:].clone()}
    parts = {f"{EMBEDDING}{part}": rows for part, rows in split.items()}
    _edit_weights(checkpoint, {EMBEDDING: None, **parts, "lm_head.weight": table})
    monkeypatch.setattr("deeptalk_edge.checkpoint.reader._ROWS_AT_ONCE", 7)
    assert Checkpoint.open(checkpoint).spec == PLAIN
    table[-1, -1] += 1
    _edit_weights(checkpoint, {"lm_head.weight": table})
    assert "lm_head.weight differs" in _refusal(checkpoint)


def test_an_untied_head_survives_saving_and_loading(tmp_path: Path) -> None:
    model = random_model(UNTIED)
    save_checkpoint(tmp_path / "checkpoint", model, config_of(UNTIED))
    loaded = load_model(tmp_path / "checkpoint")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_the_authors_encoder_path_is_refused_until_another_is_named(tmp_path: Path) -> None:
    checkpoint = _saved(tmp_path)
    elsewhere = (checkpoint / "audio_encoder").rename(tmp_path / "whisper-medium")
    _edit_config(checkpoint, mm_audio_encoder="/mnt/data/whisper-medium")
    assert "--encoder" in _refusal(checkpoint)
    assert Checkpoint.open(checkpoint, encoder=elsewhere).spec == PLAIN


def _write_snac(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(SNAC_CONFIG))
    save_file(
        {"decoder.weight": torch.ones(2, dtype=torch.float16)}, directory / "model.safetensors"
    )
    return directory


@pytest.mark.parametrize("beside", [True, False])
def test_the_codec_is_found_in_the_models_folder_or_at_the_named_place(
    beside: bool, tmp_path: Path
) -> None:
    checkpoint = _saved(tmp_path)
    snac = _write_snac((checkpoint if beside else tmp_path / "elsewhere") / "snac")
    codec = Checkpoint.open(checkpoint, snac=None if beside else snac).codec
    assert codec.spec.frame_samples == 2048
    assert codec.tensor("decoder.weight").tolist() == [1, 1]
    with pytest.raises(ArtifactError, match=r"lacks x, it holds decoder\.weight"):
        codec.tensor("x")


def test_a_model_without_a_codec_opens_and_refuses_to_open_its_codec(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(_saved(tmp_path))
    with pytest.raises(ArtifactError, match="name one with --snac"):
        _ = checkpoint.codec
    with pytest.raises(ArtifactError, match="name one with --snac"):
        CodecCheckpoint.open(tmp_path)
