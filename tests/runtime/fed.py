"""Inputs of tests for engines of any kind, and the engines' logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.experts.open import PagingSettings, paged_experts
from deeptalk_edge.runtime.experts.paged import PagedExperts
from deeptalk_edge.runtime.lm.engine import Engine, Logits
from tests.runtime.speaking_checkpoint import SPEC

Array = NDArray[np.float32]

ROWS: Ids = np.random.default_rng(7).integers(0, SPEC.vocabulary.size, (20, 8))
MASK = np.isin(np.arange(20), [4, 5, 6, 7, 11])


def features_of(width: int) -> Array:
    """Features (5, C) for the rows that MASK marks."""
    return np.random.default_rng(8).normal(size=(5, width)).astype(np.float32)


def heard(engine: Engine, features: Array) -> Logits:
    """The logits of ROWS, some of which are speech."""
    engine.reset()
    engine.prefill(ROWS, features, MASK)
    return copied(engine.logits())


def written(engine: Engine, rows: Ids, width: int) -> Logits:
    """The logits of rows without speech, from an engine of this width."""
    engine.reset()
    engine.prefill(rows, np.empty((0, width), np.float32), np.zeros(len(rows), np.bool_))
    return copied(engine.logits())


def decoded(engine: Engine, rows: Ids) -> Logits:
    """The logits of rows that are fed one by one."""
    engine.reset()
    for row in rows:
        logits = engine.decode_step(row[None])
    return copied(logits)


def forked(engine: Engine, tails: Iterable[Ids]) -> list[Logits]:
    """Each item's logits after the engine has forked and fed a tail to each."""
    engine.fork()
    for rows in zip(*tails, strict=True):
        logits = copied(engine.decode_step(np.stack(rows)))
    return [Logits(logits.text[[item]], logits.codes[[item]]) for item in range(2)]


def copied(logits: Logits) -> Logits:
    return Logits(logits.text.copy(), logits.codes.copy())


def own_experts(bundle: Bundle) -> Callable[[], PagedExperts]:
    """Experts that an engine owns, as many in memory as fit."""
    return lambda: paged_experts(bundle, PagingSettings())
