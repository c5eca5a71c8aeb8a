"""The cache behaves like a list of rows per item."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.runtime.lm.kv_cache import KvCache

LAYERS, CAPACITY, WIDTH = 2, 12, 3


def new_cache() -> KvCache:
    return KvCache(num_layers=LAYERS, capacity=CAPACITY, width=WIDTH)


def write(cache: KvCache, values: list[list[int]]) -> None:
    """Write rows (T, B) of plain numbers."""
    for layer in range(LAYERS):
        ahead = cache.ahead(layer, len(values))
        ahead[...] = np.array(values, np.float32)[:, :, None] + 1000 * layer
    cache.advance(len(values))


def read(cache: KvCache) -> list[list[int]]:
    for layer in range(1, LAYERS):
        np.testing.assert_array_equal(cache.past(layer)[1:], cache.past(0)[1:] + 1000 * layer)
        np.testing.assert_array_equal(cache.past(layer)[0], 0.0)
    assert cache.past(0).flags.c_contiguous
    return [[int(value) for value in row] for row in cache.past(0)[1:, :, 0]]


@given(st.data())
def test_any_use_equals_plain_lists(data: st.DataObject) -> None:
    cache = new_cache()
    items: list[list[int]] = [[]]
    dropped: list[int] | None = None
    next_value, is_forked = 1, False
    for _ in range(data.draw(st.integers(1, 25))):
        deeds = ["write", "trim"]
        if not is_forked:
            deeds.append("fork")
        if len(items) == 2:
            deeds.append("keep")
        if dropped is not None:
            deeds.append("recall")
        deed = data.draw(st.sampled_from(deeds))
        if deed == "write":
            rows = data.draw(st.integers(1, 3))
            if len(items[0]) + rows > CAPACITY:
                with pytest.raises(DoesNotFit):
                    cache.ahead(0, rows)
                continue
            block = [
                [next_value + i * len(items) + b for b in range(len(items))] for i in range(rows)
            ]
            next_value += rows * len(items)
            write(cache, block)
            for b, item in enumerate(items):
                item.extend(row[b] for row in block)
        elif deed == "trim":
            position = data.draw(st.integers(0, len(items[0])))
            cache.trim(position)
            items = [item[:position] for item in items]
        elif deed == "fork":
            cache.fork()
            items, is_forked = [items[0], list(items[0])], True
        elif deed == "keep":
            kept = data.draw(st.integers(0, 1))
            cache.keep(kept)
            items, dropped = [items[kept]], items[1 - kept]
        else:
            cache.recall()
            assert dropped is not None
            items, dropped, is_forked = [dropped], None, False
        assert cache.num_items == len(items)
        assert cache.num_rows == len(items[0])
        assert read(cache) == [list(row) for row in zip(*items, strict=True)]


def test_a_full_cache_says_how_much_it_holds() -> None:
    with pytest.raises(DoesNotFit, match="13 rows of conversation, the cache holds 12"):
        new_cache().ahead(0, 13)


def test_reset_forgets_a_fork() -> None:
    cache = new_cache()
    write(cache, [[1], [2]])
    cache.fork()
    cache.reset()
    assert (cache.num_rows, cache.num_items) == (0, 1)
    write(cache, [[7]])
    cache.fork()
    assert read(cache) == [[7, 7]]


def test_out_of_order_calls_are_refused() -> None:
    cache = new_cache()
    with pytest.raises(ValueError, match="no item was dropped"):
        cache.recall()
    with pytest.raises(ValueError, match="there are 1 items"):
        cache.keep(0)
    with pytest.raises(ValueError, match="there are 0 rows"):
        cache.trim(1)
    cache.fork()
    with pytest.raises(ValueError, match="forked already"):
        cache.fork()
