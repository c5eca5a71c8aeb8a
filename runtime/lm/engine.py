"""The protocol of a language model in a conversation.

An engine owns its cache. Rows are fed in order; `logits` returns the logits of the last row. Two
items are two answers to one prompt, decoded together. Item 0 speaks. Item 1 only writes: speech
codes do not disturb its text, and its cache becomes the history of the next turn.

    prefill(prompt[:-1]); fork(); decode_step(both last rows); ...; keep(0); ...; recall()
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.rows import Ids

Array = NDArray[np.float32]


class Logits(NamedTuple):
    """The logits of the next row. The engine owns the arrays; its next call overwrites them."""

    text: Array
    """(B, V_text), or (1, V_text) of the last item only: use `text[-1]`."""
    codes: Array
    """(B, K, V_code), or (1, K, V_code) of item 0 only: use `codes[0]`."""


class Engine(Protocol):
    """A language model in the middle of one conversation. One owner; not thread-safe.

    Every method but `close` raises UsageError once the engine is closed, and in a forked child.
    """

    @property
    def num_rows(self) -> int:
        """Rows fed so far."""

    @property
    def num_items(self) -> int:
        """One, or two after `fork`."""

    @property
    def capacity(self) -> int:
        """Capacity of the cache in rows."""

    def prefill(self, rows: Ids, features: Array, audio_mask: NDArray[np.bool_]) -> None:
        """Feed rows (T, K + 1) to the one item. `features` (n, C) replace the codec columns of the
        n rows that `audio_mask` (T,) marks.

        Raises DoesNotFit if the cache is full, BackendError if a graph fails.
        """

    def feed(self, rows: Ids) -> None:
        """Take one row for each item, (B, K + 1). An engine on a device starts to compute it and
        returns. Other engines compute it in `logits`, and drop it if the cache changes before.
        `num_rows` counts it once its computation has begun.

        Raises DoesNotFit if the cache is full, BackendError if a graph fails.
        """

    def logits(self) -> Logits:
        """Return the logits of the last row fed, waiting for them. `prefill` does not return
        logits, because they cost a run of the head.

        Raises as `feed` does.
        """

    def decode_step(self, rows: Ids) -> Logits:
        """`feed`, then `logits`."""

    def fork(self) -> None:
        """Continue with two items that share the rows so far."""

    def keep(self, item: int) -> None:
        """Continue with one of two items; the other is kept for `recall`."""

    def recall(self) -> None:
        """Return to the item that `keep` dropped, with the rows it had then."""

    def trim(self, position: int) -> None:
        """Remove the rows from `position` on."""

    def reset(self) -> None:
        """Remove all rows."""

    def close(self) -> None:
        """Release everything; the engine cannot be used again. Idempotent."""
