"""The routed experts on disk, mapped into memory and checked when they are first read.

A record is one expert: `gate_up` (2G, C), then `down` (C, G), float32, page-aligned. The kernel
pages the mapping; nothing is copied unless the mapping shows damage that a fresh read does not.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import ArtifactError, ExpertUnavailable

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRecord:
    """Where one expert lies in the file."""

    layer: int
    expert: int
    offset: int
    bytes: int
    crc32: int


class ExpertWeights(NamedTuple):
    """One expert, read-only."""

    gate_up: Array
    """(2G, C)"""
    down: Array
    """(C, G)"""


class ExpertStore:
    """Gives experts by layer and id. One per engine; not thread-safe."""

    def __init__(
        self, path: Path, records: Sequence[ExpertRecord], *, width: int, ffn_width: int
    ) -> None:
        """Map the file.

        Raises ArtifactError if a record does not lie in the file or has another size than an
        expert.
        """
        self._path = path
        self._records = {(record.layer, record.expert): record for record in records}
        self._gate_up, self._down = (2 * ffn_width, width), (width, ffn_width)
        self._checked: dict[tuple[int, int], ExpertWeights] = {}
        expert_bytes = 3 * width * ffn_width * 4
        self._file = path.open("rb")
        size_bytes = os.fstat(self._file.fileno()).st_size
        for record in records:
            if record.bytes != expert_bytes or record.offset + record.bytes > size_bytes:
                self._file.close()
                raise ArtifactError(
                    f"{path}: {_name(record)} has {record.bytes} bytes at {record.offset}, "
                    f"expected {expert_bytes} within {size_bytes}; export the bundle again"
                )
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """One expert's weights; its checksum is verified the first time.

        Raises ExpertUnavailable, naming file and record, if it cannot be read or is damaged.
        """
        key = (layer, expert)
        if key not in self._checked:
            self._checked[key] = self._read(self._records[key])
        return self._checked[key]

    def close(self) -> None:
        """Forget the weights; the mapping goes when the last view of it does."""
        self._checked.clear()
        self._file.close()

    def __enter__(self) -> ExpertStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, record: ExpertRecord) -> ExpertWeights:
        end = record.offset + record.bytes
        try:
            # A page behind the end of a file that shrank would be a fatal signal, not an error.
            if os.fstat(self._file.fileno()).st_size < end:
                raise ExpertUnavailable(
                    f"{self._path}: {_name(record)} lies behind the end of the file; copy the "
                    "bundle again"
                )
            content: memoryview | bytes = memoryview(self._map)[record.offset : end]
            if zlib.crc32(content) != record.crc32:
                content = os.pread(self._file.fileno(), record.bytes, record.offset)
        except OSError as error:
            raise ExpertUnavailable(
                f"{self._path}: {_name(record)} cannot be read ({error}); check the disk"
            ) from error
        found = zlib.crc32(content)
        if found != record.crc32:
            raise ExpertUnavailable(
                f"{self._path}: {_name(record)} is damaged (CRC-32 {found:08x}, expected "
                f"{record.crc32:08x}, read twice); copy the bundle again"
            )
        floats = np.frombuffer(content, np.float32)
        split = self._gate_up[0] * self._gate_up[1]
        return ExpertWeights(
            floats[:split].reshape(self._gate_up), floats[split:].reshape(self._down)
        )


def _name(record: ExpertRecord) -> str:
    return f"layer {record.layer}, expert {record.expert}"
