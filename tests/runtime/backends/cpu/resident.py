"""All experts resident in memory: the reference for tests of paging."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.model.rows import Ids

Tables = NDArray[np.uint64]


class Resident:
    """`ExpertTables` without a pager."""

    def __init__(self, bundle: Bundle) -> None:
        decoder = bundle.manifest.model.decoder
        self.slot_bytes = bundle.manifest.record_format.content_bytes
        self._file = np.fromfile(bundle.file(bundle.manifest.experts.file), np.uint8)
        self._tables = np.zeros((decoder.num_layers, decoder.num_experts), np.uint64)
        for record in bundle.manifest.experts.records:
            place = self._file.ctypes.data + record.offset
            self._tables[record.layer, record.expert] = place

    def begin_prefill(self, audio_mask: NDArray[np.bool_]) -> None:
        pass

    def begin_step(self, num_items: int) -> None:
        pass

    def all_resident(self) -> AbstractContextManager[bool]:
        return nullcontext(True)

    def addresses(self, layer: int) -> Tables:
        table: Tables = self._tables[layer]
        return table

    def tables(
        self, layer: int, ids: Ids, weights: NDArray[np.float32], normed: NDArray[np.float32]
    ) -> Generator[Tables, None, None]:
        raise AssertionError("all of it is there")

    def close(self) -> None:
        pass
