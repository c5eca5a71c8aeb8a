"""Common code of engines that own a cache: which rows there are, and of which items.

Logits belong to the last row fed. Methods that feed rows set `_fed_items`; methods that change the
cache clear it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.lifetime import Lifetime, while_open
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.lm.engine import Logits

Array = NDArray[np.float32]


class Cache(Protocol):
    """Rows of one conversation, of one item or two."""

    num_rows: int
    capacity: int

    @property
    def num_items(self) -> int: ...

    def fork(self) -> None: ...

    def keep(self, item: int) -> None: ...

    def recall(self) -> None: ...

    def trim(self, position: int) -> None: ...

    def reset(self) -> None: ...


CacheT = TypeVar("CacheT", bound=Cache)


class CachedEngine(ABC, Generic[CacheT]):
    """Implements the cache's methods of `Engine`, and a `feed` for engines that compute on demand.
    A subclass feeds rows and computes logits, each under `while_open`, so that a close by another
    thread takes effect after the pass."""

    def __init__(self, cache: CacheT, give_back: Callable[[], None]) -> None:
        """`give_back` closes everything that the engine opened."""
        self._cache = cache
        self._lifetime = Lifetime("the engine", give_back)
        self._fed_items = 0
        """Items whose last row waits for its logits, or 0."""
        self._pending: Ids | None = None
        """Rows that `feed` took and that are not computed."""

    @property
    def num_rows(self) -> int:
        return self._cache.num_rows

    @property
    def num_items(self) -> int:
        return self._cache.num_items

    @property
    def capacity(self) -> int:
        return self._cache.capacity

    @abstractmethod
    def decode_step(self, rows: Ids) -> Logits:
        """See `Engine`."""

    @abstractmethod
    def _last_logits(self) -> Logits:
        """Return the logits of the last computed row."""

    @while_open
    def feed(self, rows: Ids) -> None:
        if self._pending is not None:
            raise ValueError("feed: the rows before wait for their logits")
        self._check_step(rows)
        self._pending = rows

    def logits(self) -> Logits:
        rows, self._pending = self._pending, None
        return self._last_logits() if rows is None else self.decode_step(rows)

    @while_open
    def fork(self) -> None:
        self._cache.fork()
        self._forget_fed()

    @while_open
    def keep(self, item: int) -> None:
        self._cache.keep(item)
        self._forget_fed()

    @while_open
    def recall(self) -> None:
        self._cache.recall()
        self._forget_fed()

    @while_open
    def trim(self, position: int) -> None:
        self._cache.trim(position)
        self._forget_fed()

    @while_open
    def reset(self) -> None:
        self._cache.reset()
        self._forget_fed()

    def close(self) -> None:
        self._lifetime.close()

    def _forget_fed(self) -> None:
        self._fed_items, self._pending = 0, None

    def _check_prompt(self, features: Array, audio_mask: NDArray[np.bool_]) -> None:
        if self.num_items != 1:
            raise ValueError("prefill: the engine is forked; a prompt has one item")
        if len(features) != audio_mask.sum():
            raise ValueError(f"{len(features)} features for {audio_mask.sum()} marked rows")

    def _check_step(self, rows: Ids) -> None:
        if len(rows) != self.num_items:
            raise ValueError(f"decode_step: {len(rows)} rows for {self.num_items} items")

    def _check_fed(self) -> None:
        if not self._fed_items:
            raise ValueError("logits: no row was fed since the engine was reset, forked or trimmed")
