"""A small random model, and a drill that uses every operation of an engine's cache in 80 steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.backends.base import Backend
from deeptalk_edge.runtime.lm.engine import Engine, Logits
from tests.export import checkpoints
from tests.runtime.speaking_checkpoint import SPEC as SMALL
from tests.runtime.speaking_checkpoint import byte_level_tokenizer

Array = NDArray[np.float32]

SPEC = replace(SMALL, decoder=replace(SMALL.decoder, width=64, expert_ffn_width=32))
"""Widths that the plugin supports."""

CONTEXT_ROWS = 64
"""So the first profile sees 16 rows, the others 64."""

_random = np.random.default_rng(5)
ROWS: Ids = _random.integers(0, SPEC.vocabulary.size, (120, 8))
FEATURES: Array = _random.normal(size=(4, SPEC.decoder.width)).astype(np.float32)
MASK = np.isin(np.arange(12), [2, 3, 4, 11])
CODES: Ids = _random.integers(0, SPEC.vocabulary.codebook_size, (20, 7))


def write_drill_checkpoint(directory: Path) -> None:
    """A whole checkpoint."""
    checkpoints.write_checkpoint(directory, SPEC)
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    chosen = {"system": "Be brief.", "max_rows": 24, "context_rows": CONTEXT_ROWS}
    chosen |= {"audio_top_k": 1, "repetition_penalty": 1.0}
    (directory / "generation_config.json").write_text(
        json.dumps({"deeptalk": chosen}), encoding="utf-8"
    )


class Drill:
    """Feeds rows in turn and records the engine's logits."""

    def __init__(self, backend: Backend, *, state_size: int) -> None:
        """`state_size` is the codec's."""
        self._backend, self._state_size = backend, state_size
        self._next = 20
        self.said: list[Array] = []

    def run(self) -> list[Array]:
        engine = self._backend.engine
        self._conversation(engine, kept=0)
        self._conversation(engine, kept=1)
        self._beyond_a_quarter(engine)
        self._sound()
        return self.said

    def _conversation(self, engine: Engine, *, kept: int) -> None:
        """Two items fork in the first profile and end in the second. One is dropped, the other
        continues and is trimmed to before the fork, then the dropped one is recalled."""
        engine.reset()
        engine.prefill(ROWS[:12], FEATURES, MASK)
        self._keep(engine.logits())
        self._steps(engine, 1)
        engine.fork()
        self._steps(engine, 5)
        engine.keep(kept)
        self._steps(engine, 2)
        engine.trim(11)
        self._steps(engine, 3)
        engine.recall()
        self._steps(engine, 2)
        engine.trim(15)
        self._steps(engine, 3)
        engine.trim(8)
        self._steps(engine, 1)
        engine.fork()  # a second time, at another place
        self._steps(engine, 2)
        engine.keep(1 - kept)
        engine.recall()
        self._steps(engine, 1)

    def _beyond_a_quarter(self, engine: Engine) -> None:
        """A long prompt, back into the first profile, and on."""
        engine.reset()
        no_features, no_audio = FEATURES[:0], np.zeros(40, np.bool_)
        engine.prefill(ROWS[:40], no_features, no_audio)
        self._keep(engine.logits())
        engine.prefill(ROWS[40:45], no_features, no_audio[:5])
        self._steps(engine, 2)
        engine.trim(14)
        self._steps(engine, 4)
        self._prompt_behind_a_step(engine)

    def _prompt_behind_a_step(self, engine: Engine) -> None:
        """Trim a row under way, as after an interruption."""
        before = engine.num_rows
        engine.feed(ROWS[60:61])
        if engine.num_rows == before:  # this engine computes the row in `logits`
            engine.logits()
        engine.prefill(ROWS[61:64], FEATURES[:1], np.array([False, False, True]))
        self._steps(engine, 2)

    def _sound(self) -> None:
        """Decode twenty frames, more than the engine takes at once."""
        codec, sizes = self._backend.codec, (20, 1, 3)
        state = np.zeros(self._state_size, np.float32)
        position = 0
        for size in sizes:
            sound, state = codec.decode(
                CODES[:size], position=position, length=1 << 40, state=state, noise=[]
            )
            position += size
            self.said += [sound, state.copy()]

    def _steps(self, engine: Engine, count: int) -> None:
        for _ in range(count):
            rows = ROWS[self._next : self._next + engine.num_items]
            self._next = (self._next + 2) % 110
            engine.feed(rows)
            self._keep(engine.logits())

    def _keep(self, logits: Logits) -> None:
        self.said += [logits.text[-1].copy(), logits.codes[0].copy()]
