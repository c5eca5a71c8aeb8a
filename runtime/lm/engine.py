"""What a backend must do to be the language model of a conversation.

An engine owns its cache. Rows are fed in order; `logits` speaks of the last one. Two items are two
answers to one prompt, side by side: item 0 speaks, item 1 only writes, which keeps its text
undisturbed by speech codes and its cache fit to be the history of the next turn.

    prefill(prompt[:-1]); fork(); decode_step(both last rows); ...; keep(0); ...; recall()
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.rows import Ids

Array = NDArray[np.float32]


class Logits(NamedTuple):
    """What an engine thinks of the next row. The arrays are the engine's: valid until its next
    call.
    """

    text: Array
    """(B, V_text), or (1, V_text) of the last item alone: use `text[-1]`."""
    codes: Array
    """(B, K, V_code), or (1, K, V_code) of item 0 alone: use `codes[0]`."""


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
        """Rows that the cache holds."""

    def prefill(self, rows: Ids, features: Array, audio_mask: NDArray[np.bool_]) -> None:
        """Feed rows (T, K + 1) to the one item. `features` (n, C) replace the codec columns of the
        n rows that `audio_mask` (T,) marks.

        Raises DoesNotFit if the cache is full, BackendError if a graph fails.
        """

    def feed(self, rows: Ids) -> None:
        """Take one row for each item, (B, K + 1). A device computes it meanwhile; an engine without
        one leaves it to `logits`, and forgets it with the next move of the cache. `num_rows` counts
        it from when it is under way.

        Raises DoesNotFit if the cache is full, BackendError if a graph fails.
        """

    def logits(self) -> Logits:
        """The logits behind the last row fed, once it is computed. After a `prefill` they cost a
        head, so that does not return them.

        Raises as `feed` does.
        """

    def decode_step(self, rows: Ids) -> Logits:
        """`feed`, then `logits`."""

    def fork(self) -> None:
        """Go on with two items that share the rows so far."""

    def keep(self, item: int) -> None:
        """Go on with one item of two; the other one waits for `recall`."""

    def recall(self) -> None:
        """Return to the item that `keep` dropped, with the rows that it had then."""

    def trim(self, position: int) -> None:
        """Forget the rows at and behind `position`."""

    def reset(self) -> None:
        """Forget everything."""

    def close(self) -> None:
        """Give back what the engine holds; it cannot be used again. Twice is once."""
