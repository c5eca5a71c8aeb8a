"""An expert is right or unavailable, never wrong."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.errors import ArtifactError, ExpertUnavailable
from deeptalk_edge.runtime.experts.store import ExpertRecord, ExpertStore

WIDTH, FFN_WIDTH = 6, 4
EXPERT_BYTES = 3 * WIDTH * FFN_WIDTH * 4


def write_experts(path: Path) -> list[ExpertRecord]:
    """Two experts, a page each."""
    records, content = [], b""
    for expert in range(2):
        body = (np.arange(3 * WIDTH * FFN_WIDTH, dtype=np.float32) + 1000 * expert).tobytes()
        crc32 = zlib.crc32(body)
        records.append(
            ExpertRecord(
                layer=1, expert=expert, offset=len(content), bytes=EXPERT_BYTES, crc32=crc32
            )
        )
        content += body.ljust(4096, b"\0")
    path.write_bytes(content)
    return records


def open_store(path: Path, records: list[ExpertRecord]) -> ExpertStore:
    return ExpertStore(path, records, width=WIDTH, ffn_width=FFN_WIDTH)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "experts.bin"


def test_weights_are_the_records_own_bytes(path: Path) -> None:
    with open_store(path, write_experts(path)) as store:
        gate_up, down = store.weights(1, 1)
        assert gate_up.shape == (2 * FFN_WIDTH, WIDTH)
        assert down.shape == (WIDTH, FFN_WIDTH)
        assert gate_up[0, 0] == 1000
        assert down[-1, -1] == 1000 + 3 * WIDTH * FFN_WIDTH - 1
        assert store.weights(1, 1).down.ctypes.data == down.ctypes.data
        assert not gate_up.flags.writeable


def test_a_damaged_record_is_named_and_its_neighbour_serves(path: Path) -> None:
    records = write_experts(path)
    content = bytearray(path.read_bytes())
    content[4096 + 5] ^= 1
    path.write_bytes(content)
    with open_store(path, records) as store:
        store.weights(1, 0)
        with pytest.raises(ExpertUnavailable, match=r"experts\.bin: layer 1, expert 1 is damaged"):
            store.weights(1, 1)


def test_a_record_is_read_afresh_before_it_is_given_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = write_experts(path)
    flaky = once_wrong(zlib.crc32)
    with open_store(path, records) as store:
        monkeypatch.setattr("deeptalk_edge.runtime.experts.store.zlib.crc32", flaky)
        assert store.weights(1, 0).gate_up[0, 1] == 1


def once_wrong(checksum: Callable[..., int]) -> Callable[..., int]:
    calls = []

    def flaky(content: bytes) -> int:
        calls.append(1)
        return checksum(content) ^ (len(calls) == 1)

    return flaky


def test_a_file_that_shrank_after_opening_is_an_error_and_no_crash(path: Path) -> None:
    with open_store(path, write_experts(path)) as store:
        path.open("r+b").truncate(4096)
        store.weights(1, 0)
        with pytest.raises(ExpertUnavailable, match="behind the end of the file"):
            store.weights(1, 1)


@pytest.mark.parametrize("change", [{"bytes": EXPERT_BYTES - 4}, {"offset": 8192}])
def test_a_record_that_is_no_expert_is_refused_at_once(path: Path, change: dict[str, int]) -> None:
    records = write_experts(path)
    fields = {name: getattr(records[1], name) for name in records[1].__slots__} | change
    with pytest.raises(ArtifactError, match="layer 1, expert 1"):
        open_store(path, [records[0], ExpertRecord(**fields)])
