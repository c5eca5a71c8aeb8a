"""The latent cache: the latents and rotary keys of every row in every layer, allocated once.

layout   position-major, (1 + S, B, W) per layer: the null row and rows [0, P) are one contiguous
         view to bind as the past, and a graph writes new rows after it
items    one, or two while an answer is decoded batch-parallel; `keep` continues with one of them
         and `recall` returns to the other as it was at `keep`
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import DoesNotFit

Array = NDArray[np.float32]

_NULL_ROWS = 1  # zeros that no query sees, so that no bound view is empty


class KvCache:
    """Rows of one conversation. One owner; not thread-safe."""

    def __init__(self, *, num_layers: int, capacity: int, width: int) -> None:
        self.capacity = capacity
        self.num_rows = 0
        """P: number of cached rows, equal in every item and layer."""
        self.num_items = 1
        # np.empty takes no memory for untouched pages: a short conversation uses little.
        size = _NULL_ROWS + capacity
        try:
            self._single = np.empty((num_layers, size, 1, width), np.float32)
            self._pair = np.empty((num_layers, size, 2, width), np.float32)
        except MemoryError:
            raise DoesNotFit(
                f"a cache of {capacity} rows takes {12e-9 * num_layers * size * width:.1f} GB; the "
                "system refuses; ask for fewer context rows"
            ) from None
        self._alone = self._pair.reshape(num_layers, 2 * size, 1, width)  # the kept item
        self._single[:, :_NULL_ROWS] = self._pair[:, :_NULL_ROWS] = 0.0
        self._rows = self._single
        self._shared_rows = 0  # leading rows that all items share, held in `_single`
        self._dropped_rows: int | None = None  # rows of the item that `keep` left in `_single`

    @property
    def _end(self) -> int:
        """Index after the last cached row in the arrays."""
        return _NULL_ROWS + self.num_rows

    def past(self, layer: int) -> Array:
        """Return the null row and a layer's cached rows, (1 + P, B, W): a contiguous view."""
        return self._rows[layer, : self._end]

    def ahead(self, layer: int, num_rows: int) -> Array:
        """Return the place (T, B, W) of new rows, after the cached ones.

        Raises DoesNotFit if the cache is full.
        """
        end = self.num_rows + num_rows
        if end > self.capacity:
            raise DoesNotFit(
                f"{end} rows of conversation, the cache holds {self.capacity}; start a new "
                "conversation or export with more context rows"
            )
        return self._rows[layer, self._end : _NULL_ROWS + end]

    def advance(self, num_rows: int) -> None:
        """Count rows that were written to `ahead`."""
        assert self.num_rows + num_rows <= self.capacity
        self.num_rows += num_rows

    def trim(self, position: int) -> None:
        """Remove the rows from `position` on."""
        if not 0 <= position <= self.num_rows:
            raise ValueError(f"trim({position}): there are {self.num_rows} rows")
        self.num_rows = position
        self._shared_rows = min(self._shared_rows, position)

    def reset(self) -> None:
        """Remove all rows."""
        self.num_rows, self.num_items = 0, 1
        self._rows, self._dropped_rows = self._single, None

    def fork(self) -> None:
        """Continue with two items that share the rows so far."""
        if self._rows is not self._single:
            raise ValueError("fork: the cache is forked already; recall or reset it first")
        self._pair[:, : self._end] = self._single[:, : self._end]
        self._rows, self.num_items = self._pair, 2
        self._shared_rows = self.num_rows

    def keep(self, item: int) -> None:
        """Continue with one of two items; the other is kept for `recall`."""
        if self.num_items != 2 or item not in (0, 1):
            raise ValueError(f"keep({item}): there are {self.num_items} items")
        own = slice(_NULL_ROWS + self._shared_rows, self._end)
        self._single[:, own, 0] = self._pair[:, own, 1 - item]
        for alone, pair in zip(self._alone, self._pair, strict=True):
            alone[: self._end, 0] = pair[: self._end, item]
        self._rows, self.num_items = self._alone, 1
        self._dropped_rows = self.num_rows

    def recall(self) -> None:
        """Return to the item that `keep` dropped, with the rows it had then."""
        if self._dropped_rows is None:
            raise ValueError("recall: no item was dropped")
        self._rows, self.num_rows, self._dropped_rows = self._single, self._dropped_rows, None
