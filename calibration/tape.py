"""An engine that records its calls and results, so that they can be replayed on another engine.

The same rows, features and forks go to both engines: what differs in the logits is the weights'
doing, and not that of an answer that took another turn at its first word.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.lm.engine import Engine, Logits

Array = NDArray[np.float32]


@dataclass(slots=True)
class Tape:
    """Calls in order, and after each that gave logits a copy of them."""

    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    logits: list[tuple[bool, Logits]] = field(default_factory=list)
    """Whether a text id is still to come, and the logits."""


class TapedEngine:
    """An `Engine` that hands everything on, and notes it while `tape` is set."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tape: Tape | None = None
        self._kept = False
        self._pending: Ids | None = None  # fed, and not computed before `logits`

    @property
    def num_rows(self) -> int:
        return self._engine.num_rows

    @property
    def num_items(self) -> int:
        return self._engine.num_items

    @property
    def capacity(self) -> int:
        return self._engine.capacity

    def prefill(self, rows: Ids, features: Array, audio_mask: NDArray[np.bool_]) -> None:
        self._note("prefill", rows.copy(), features.copy(), audio_mask.copy())
        self._engine.prefill(rows, features, audio_mask)

    def decode_step(self, rows: Ids) -> Logits:
        self._note("decode_step", rows.copy())
        return self._noted(self._engine.decode_step(rows))

    def feed(self, rows: Ids) -> None:
        self._pending = rows.copy()

    def logits(self) -> Logits:
        if self._pending is not None:  # one call on the tape, as engines without a device make it
            return self.decode_step(self._pending)
        self._note("logits")
        return self._noted(self._engine.logits())

    def fork(self) -> None:
        self._note("fork")
        self._kept = False
        self._engine.fork()

    def keep(self, item: int) -> None:
        self._note("keep", item)
        self._kept = True
        self._engine.keep(item)

    def recall(self) -> None:
        self._note("recall")
        self._kept = False
        self._engine.recall()

    def trim(self, position: int) -> None:
        self._note("trim", position)
        self._engine.trim(position)

    def reset(self) -> None:
        self._note("reset")
        self._kept = False
        self._engine.reset()

    def close(self) -> None:
        self._engine.close()

    def _note(self, name: str, *arguments: Any) -> None:
        self._pending = None  # every move of the cache forgets it
        if self.tape is not None:
            self.tape.calls.append((name, arguments))

    def _noted(self, logits: Logits) -> Logits:
        if self.tape is not None:
            copy = Logits(logits.text.copy(), logits.codes.copy())
            self.tape.logits.append((not self._kept, copy))
        return logits


def replay(tape: Tape, engine: Engine) -> Iterator[Logits]:
    """Ask another engine the same; yields its logits, each valid until the next."""
    for name, arguments in tape.calls:
        said = getattr(engine, name)(*arguments)
        if isinstance(said, Logits):
            yield said
