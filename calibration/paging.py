"""Does the pager gain from measured popularity and succession? Replayed on turns held out.

Every second turn gives the counts, the others are replayed through the pager's own decisions, once
as it decides without them and once with them. They are used where every pool gains two points of
hits; else the pager stays as it is, and the table says so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from deeptalk_edge.bundle.calibration import PagingGain
from deeptalk_edge.calibration.observe import succession
from deeptalk_edge.devices.replay.locality import use_counts_of
from deeptalk_edge.devices.replay.simulator import ReplaySettings, replay
from deeptalk_edge.runtime.experts.policy import Phased, UseCounts
from deeptalk_edge.runtime.experts.routes import Routes

POOLS = (0.25, 0.42, 0.65)
LEAST_GAIN = 0.02


def measured_use_counts(routes: Routes) -> UseCounts:
    """Popularity and succession in recorded routes."""
    return replace(use_counts_of(routes), succession=succession(routes))


def paging_gain(routes: Routes) -> PagingGain | None:
    """Hits with and without, by pool; None if there are too few turns to hold some out."""
    turns = sorted({each.turn for each in routes.passes})
    if len(turns) < 4:
        return None
    counts = measured_use_counts(_of_turns(routes, set(turns[::2])))
    held_out = _of_turns(routes, set(turns[1::2]))
    plain = tuple(_hits(held_out, None, pool) for pool in POOLS)
    measured = tuple(_hits(held_out, counts, pool) for pool in POOLS)
    return PagingGain(
        pools=POOLS,
        phased=plain,
        measured=measured,
        used=all(a - b >= LEAST_GAIN for a, b in zip(measured, plain, strict=True)),
    )


def _of_turns(routes: Routes, turns: set[int]) -> Routes:
    return replace(routes, passes=[each for each in routes.passes if each.turn in turns])


def _hits(routes: Routes, counts: UseCounts | None, pool: float) -> float:
    num_keys = len(routes.layers) * routes.num_experts
    settings = ReplaySettings(num_slots=max(round(pool * num_keys), 2))
    residency = replay(routes, lambda keys, experts: Phased(keys, experts, counts), settings)
    hits, misses = float(np.sum(residency.hits)), float(np.sum(residency.misses))
    return hits / max(hits + misses, 1.0)
