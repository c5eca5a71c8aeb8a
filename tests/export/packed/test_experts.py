"""The records of experts.bin."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import ExpertDtype, ExpertRecord, RecordFormat
from deeptalk_edge.checkpoint.config import read_config
from deeptalk_edge.checkpoint.expert_split import read_audio_experts
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.export.packed.experts import RoundedExperts, write_experts
from deeptalk_edge.runtime.experts.paged import float32_record
from tests.export.checkpoints import Written, edit_config, write_checkpoint
from tests.specs import PLAIN

Array = NDArray[np.float32]

AUDIO = [[3, 1], [4]]

SPEC = PLAIN.decoder
FLOAT32 = RecordFormat(dtype="float32", width=SPEC.width, ffn_width=SPEC.expert_ffn_width)


def test_a_record_holds_the_experts_matrices_and_their_checksum(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "checkpoint")
    records = _write(written.place, tmp_path)
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
    place = write_checkpoint(tmp_path / "checkpoint").place
    layers_done: dict[int, list[ExpertRecord]] = {}
    records = _write(place, tmp_path, layer_done=layers_done.__setitem__)
    assert [(r.layer, r.expert) for r in records] == [
        *[(1, 1), (1, 3), (1, 0), (1, 2), (1, 4)],
        *[(2, 4), (2, 0), (2, 1), (2, 2), (2, 3)],
    ]
    record_bytes = 3 * SPEC.width * SPEC.expert_ffn_width * 4
    stride = -(-record_bytes // 4096) * 4096
    assert [r.offset for r in records] == [i * stride for i in range(len(records))]
    assert {r.bytes for r in records} == {record_bytes}
    assert (tmp_path / "experts.bin").stat().st_size == stride * len(records)
    assert layers_done == {1: records[:5], 2: records[5:]}


def test_the_runtime_reads_records_in_place(tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path / "checkpoint")
    records = _write(written.place, tmp_path)
    record = next(r for r in records if (r.layer, r.expert) == (2, 4))
    content = np.fromfile(tmp_path / "experts.bin", np.uint8)[record.offset :]
    weights = float32_record(FLOAT32)(content[: FLOAT32.record_bytes])
    np.testing.assert_array_equal(weights.down, _weight(written, 2, 4, "down"))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_records_have_the_kernels_layout_in_every_precision(
    tmp_path: Path, dtype: ExpertDtype
) -> None:
    spec = replace(PLAIN, decoder=replace(SPEC, width=32, expert_ffn_width=16))
    written = write_checkpoint(tmp_path / "checkpoint", spec)
    records = RecordFormat(dtype=dtype, width=32, ffn_width=16)
    first = _write(written.place, tmp_path, records=records)[0]
    content = np.fromfile(tmp_path / "experts.bin", np.uint8, records.record_bytes)
    gate_up, down = records.dequantise(records.unpack(content))
    for found, parts in ((gate_up, ("gate", "up")), (down, ("down",))):
        exact = np.concatenate([_weight(written, first.layer, first.expert, p) for p in parts])
        assert np.abs(found - exact).max() <= np.abs(exact).max() / 120


def test_whole_layers_of_a_killed_export_stay_unless_one_is_damaged(tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "checkpoint").place
    records = _write(place, tmp_path)
    path = tmp_path / "experts.bin"
    whole = path.read_bytes()
    for damage in (b"", b"\0", whole[5:] + b"half a record"):
        path.write_bytes(whole[: records[5].offset] + damage)
        layers_done: dict[int, list[ExpertRecord]] = {}
        again = _write(place, tmp_path, layer_done=layers_done.__setitem__, done=records[:5])
        assert (again, path.read_bytes(), [*layers_done]) == (records, whole, [2])
    path.write_bytes(b"x" + whole[1:])
    layers_done = {}
    assert _write(place, tmp_path, layer_done=layers_done.__setitem__, done=records[:5]) == records
    path.unlink()
    assert _write(place, tmp_path, done=records[:5]) == records
    assert (path.read_bytes(), [*layers_done]) == (whole, [1, 2])


@pytest.mark.parametrize("named", ["experts.json", "/mnt/elsewhere/experts.json"])
def test_the_audio_experts_file_is_found_beside_the_config(named: str, tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "checkpoint", audio_experts_file=named).place
    (place / "experts.json").write_text(json.dumps(AUDIO), encoding="utf-8")
    assert read_audio_experts(read_config(place)) == AUDIO


@pytest.mark.parametrize("named", [None, "gone.json"])
def test_without_the_file_experts_keep_their_order(named: str | None, tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "checkpoint", audio_experts_file=named).place
    assert read_audio_experts(read_config(place)) == [[], []]


@pytest.mark.parametrize("content", ["[[1]]", "[[1], [5]]", "[[1], 2]", '[[1], ["a"]]', "{}", "["])
def test_lists_that_do_not_fit_the_model_are_refused(content: str, tmp_path: Path) -> None:
    place = write_checkpoint(tmp_path / "checkpoint").place
    edit_config(place, audio_experts_file="experts.json")
    (place / "experts.json").write_text(content, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"experts\.json"):
        read_audio_experts(read_config(place))


def _write(
    place: Path,
    directory: Path,
    *,
    records: RecordFormat = FLOAT32,
    layer_done: Callable[[int, list[ExpertRecord]], object] = lambda layer, records: None,
    done: Sequence[ExpertRecord] = (),
) -> list[ExpertRecord]:
    path = directory / "experts.bin"
    source = RoundedExperts(Checkpoint.open(place), records)
    return write_experts(SPEC, source, AUDIO, path, layer_done, done=done)


def _weight(written: Written, layer: int, expert: int, part: str) -> Array:
    name = f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
    weight: Array = written.model.state_dict()[name].numpy()
    return weight
