"""Stock ONNX Runtime operators as a contender."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bench.cpu.stock_graph import write_stock_graph
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.runtime.backends.ort.graph import OrtGraph


class StockDecoder:
    """A session for each number of threads, each with packed weights; all share one cache."""

    def __init__(
        self, spec: ModelSpec, work: Path, threads: Sequence[int], cache_rows: int
    ) -> None:
        decoder = spec.decoder
        with tempfile.TemporaryDirectory(dir=work) as folder:
            place = Path(folder) / "stock.onnx"
            write_stock_graph(place, spec, cache_rows)
            self._graphs = {count: OrtGraph(place, threads=count) for count in threads}
        self._caches = np.full(
            (decoder.num_layers, cache_rows, decoder.cache_width), 0.01, np.float32
        )
        self._random, self._width = np.random.default_rng(3), decoder.width
        self._position = 0
        self.use(threads[0])

    def use(self, threads: int) -> None:
        self._graph = self._graphs[threads]

    def fill(self, position: int) -> None:
        """Set the number of cached rows; the cache is full of plausible values."""
        self._position = position

    def feed(self, num_rows: int) -> NDArray[np.float32]:
        """Run rows after the cached ones and append them; returns the logits (1, V) of the last."""
        start, end = self._position, self._position + num_rows
        feeds: dict[str, NDArray[Any]] = {
            "x": self._random.standard_normal((num_rows, self._width), np.float32),
            "positions": np.arange(start, end),
        }
        for layer, cache in enumerate(self._caches):
            feeds[f"cache_{layer}"] = cache[:start]
        logits, *rows = self._graph.run(feeds)
        for cache, row in zip(self._caches, rows, strict=True):
            cache[start:end] = row
        return logits
