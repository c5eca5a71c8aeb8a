"""The graph of stock operators computes a decoder, so its time can be compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from deeptalk_edge.bench.cpu.stock_graph import write_stock_graph
from deeptalk_edge.runtime.backends.ort.graph import OrtGraph
from tests.specs import DECODER, PLAIN

SPEC = replace(
    PLAIN,
    decoder=replace(
        DECODER,
        width=128,
        rope_dim=16,
        dense_ffn_width=128,
        expert_ffn_width=128,
        value_dim=32,
        latent_dim=128,
    ),
)


def test_rows_after_a_cache_have_the_logits_of_one_pass(tmp_path: Path) -> None:
    place = tmp_path / "stock.onnx"
    write_stock_graph(place, SPEC, cache_rows=8)
    graph = OrtGraph(place, threads=1)
    layers = range(SPEC.decoder.num_layers)
    x = np.random.default_rng(0).standard_normal((6, 128), np.float32)

    def run(first: int, last: int, caches: list[np.ndarray]) -> list[np.ndarray]:
        feeds = {f"cache_{i}": caches[i] for i in layers}
        return graph.run({"x": x[first:last], "positions": np.arange(first, last), **feeds})

    empty = [np.zeros((0, SPEC.decoder.cache_width), np.float32) for _ in layers]
    whole, *rows = run(0, 6, empty)
    _, *old_rows = run(0, 4, empty)
    after, *new_rows = run(4, 6, old_rows)
    assert whole.shape == (1, SPEC.vocabulary.size)
    assert 0.01 < whole.std() < 100
    np.testing.assert_allclose(after, whole, rtol=0, atol=2e-4 * np.abs(whole).max())
    for new, row in zip(new_rows, rows, strict=True):
        np.testing.assert_allclose(new, row[4:], rtol=0, atol=1e-4 * np.abs(row).max())
