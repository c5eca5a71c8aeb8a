"""The records of experts.bin."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.checkpoint import Checkpoint
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.export.experts import read_audio_experts, write_experts
from deeptalk_edge.runtime.experts.store import ExpertStore
from tests.export.checkpoints import Written, edit_config, write_checkpoint
from tests.specs import PLAIN

Array = NDArray[np.float32]

AUDIO = [[3, 1], [4]]

SPEC = PLAIN.decoder


def test_a_record_is_the_experts_matrices_with_their_checksum(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "checkpoint")
    records = write_experts(Checkpoint.open(written.place), AUDIO, tmp_path, lambda layer: None)
    content = (tmp_path / "experts.bin").read_bytes()
    for record in records:
        found = content[record.offset : record.offset + record.bytes]
        expected = b"".join(
            _weight(written, record.layer, record.expert, part).tobytes()
            for part in ("gate", "up", "down")
        )
        assert found == expected
        assert record.crc32 == zlib.crc32(expected)


def test_records_lie_on_pages_layer_by_layer_audio_experts_first(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint").place)
    layers_done: list[int] = []
    records = write_experts(checkpoint, AUDIO, tmp_path, layers_done.append)
    assert [(r.layer, r.expert) for r in records] == [
        *[(1, 1), (1, 3), (1, 0), (1, 2), (1, 4)],
        *[(2, 4), (2, 0), (2, 1), (2, 2), (2, 3)],
    ]
    record_bytes = 3 * SPEC.width * SPEC.expert_ffn_width * 4
    stride = -(-record_bytes // 4096) * 4096
    assert [r.offset for r in records] == [i * stride for i in range(len(records))]
    assert {r.bytes for r in records} == {record_bytes}
    assert (tmp_path / "experts.bin").stat().st_size == stride * len(records)
    assert layers_done == [1, 2]


def test_the_runtimes_store_reads_them(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "checkpoint")
    records = write_experts(Checkpoint.open(written.place), AUDIO, tmp_path, lambda layer: None)
    path = tmp_path / "experts.bin"
    with ExpertStore(path, records, width=SPEC.width, ffn_width=SPEC.expert_ffn_width) as store:
        weights = store.weights(2, 4)
        np.testing.assert_array_equal(weights.down, _weight(written, 2, 4, "down"))


@pytest.mark.parametrize("named", ["experts.json", "/mnt/elsewhere/experts.json"])
def test_the_audio_experts_file_is_found_beside_the_config(named: str, tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "checkpoint", audio_experts_file=named).place
    (place / "experts.json").write_text(json.dumps(AUDIO), encoding="utf-8")
    assert read_audio_experts(place, SPEC) == AUDIO


@pytest.mark.parametrize("named", [None, "gone.json"])
def test_without_the_file_no_expert_comes_first(named: str | None, tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "checkpoint", audio_experts_file=named).place
    assert read_audio_experts(place, SPEC) == [[], []]


@pytest.mark.parametrize("content", ["[[1]]", "[[1], [5]]", "[[1], 2]", '[[1], ["a"]]', "{}", "["])
def test_lists_that_do_not_fit_the_model_are_refused(content: str, tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "checkpoint").place
    edit_config(place, audio_experts_file="experts.json")
    (place / "experts.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"experts\.json"):
        read_audio_experts(place, SPEC)


def _weight(written: Written, layer: int, expert: int, part: str) -> Array:
    name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
    weight: Array = written.model.state_dict()[name].numpy()
    return weight
