"""The CPU backend's latent cache: two items that may share their first rows.

layout   (L, S, row) bytes, `main` for one item and item 0 of two, `side` for item 1
fork     copies nothing: item 1 reads the rows so far from `main` and writes new rows to `side`
recall   copies the rows that only `side` holds to `main`
"""

from __future__ import annotations

from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.runtime.backends.cpu.huge_pages import huge_array
from deeptalk_edge.runtime.backends.cpu.library import Pass, Span, span

_MAIN, _SIDE = 0, 1


class CpuCache:
    """Rows of one conversation. One owner; not thread-safe."""

    def __init__(self, *, num_layers: int, capacity: int, row_bytes: int) -> None:
        self.capacity = capacity
        self.num_rows = 0
        shape = (num_layers, capacity, row_bytes)
        size = num_layers * capacity * row_bytes
        self._caches = [huge_array(size).reshape(shape) for _ in range(2)]
        self._spans = [span(cache) for cache in self._caches]
        self._items = [_MAIN]
        self._num_shared = 0  # leading rows that the item in `side` shares with `main`
        self._dropped_rows: int | None = None  # rows of the item that `keep` dropped

    @property
    def num_items(self) -> int:
        return len(self._items)

    def next_rows(self, num_rows: int) -> Pass:
        """Return where a pass of the decoder reads and writes.

        Raises DoesNotFit if the cache is full.
        """
        end = self.num_rows + num_rows
        if end > self.capacity:
            raise DoesNotFit(
                f"{end} rows of conversation, the cache holds {self.capacity}; start a new "
                "conversation or export with more context rows"
            )
        own = [self._spans[item] for item in self._items]
        return Pass(
            self._spans[_MAIN],
            (Span * 2)(*own),
            self.num_items,
            num_rows,
            self.num_rows,
            self._num_shared,
        )

    def advance(self, num_rows: int) -> None:
        """Count rows that were written."""
        self.num_rows += num_rows

    def fork(self) -> None:
        if self._is_forked:
            raise ValueError("fork: the cache is forked already; recall or reset it first")
        self._items, self._num_shared = [_MAIN, _SIDE], self.num_rows

    def keep(self, item: int) -> None:
        if self.num_items != 2 or item not in (0, 1):
            raise ValueError(f"keep({item}): there are {self.num_items} items")
        self._items, self._dropped_rows = [item], self.num_rows

    def recall(self) -> None:
        if self._dropped_rows is None:
            raise ValueError("recall: no item was dropped")
        if self._items == [_MAIN]:
            self._copy(_SIDE, _MAIN, self._num_shared, self._dropped_rows)
        self.num_rows = self._dropped_rows
        self._become_single()

    def trim(self, position: int) -> None:
        if not 0 <= position <= self.num_rows:
            raise ValueError(f"trim({position}): there are {self.num_rows} rows")
        if self._dropped_rows is not None and self._items == [_MAIN]:
            # The dropped item still needs the rows that will be overwritten.
            self._copy(_MAIN, _SIDE, position, self._num_shared)
        self._num_shared = min(self._num_shared, position)
        self.num_rows = position

    def reset(self) -> None:
        self.num_rows = 0
        self._become_single()

    @property
    def _is_forked(self) -> bool:
        return self.num_items == 2 or self._dropped_rows is not None

    def _become_single(self) -> None:
        self._items, self._num_shared, self._dropped_rows = [_MAIN], 0, None

    def _copy(self, source: int, target: int, start: int, end: int) -> None:
        self._caches[target][:, start:end] = self._caches[source][:, start:end]
