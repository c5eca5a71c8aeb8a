"""How predictable recorded routes are: what a pool of a given size could do with them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from deeptalk_edge.devices.replay.simulator import ReplaySettings, replay
from deeptalk_edge.runtime.experts.policy import Lru, Phase, UseCounts
from deeptalk_edge.runtime.experts.routes import Modality, Routes

_SHARES = (0.16, 0.32, 0.42)


def locality(routes: Routes) -> dict[str, Any]:
    """The figures of docs/measurements/routes.md. A share is None if nothing was counted."""
    num_records = len(routes.layers) * routes.num_experts
    steps = [each for each in routes.passes if each.phase is Phase.SPEAKING]
    prefills = [each for each in routes.passes if each.phase is Phase.THINKING]
    return {
        "source": routes.source,
        "turns": len({each.turn for each in routes.passes}),
        "decode_steps": len(steps),
        "prefills": len(prefills),
        "layers": len(routes.layers),
        "experts_per_layer": routes.num_experts,
        "top_k": routes.top_k,
        "overlap_by_chance": routes.top_k / routes.num_experts,
        "overlap_with_previous_row": _overlap(routes),
        "lru_hits": {
            f"{share:.0%}": _lru_hits(routes, max(round(num_records * share), 2))
            for share in _SHARES
        },
        "lru_hits_per_layer": {
            f"{share:.0%}": _lru_hits_per_layer(routes, max(round(routes.num_experts * share), 1))
            for share in _SHARES
        },
        "experts_touched_by_a_prefill": _mean(
            len(call.experts) for each in prefills if each.num_heard for call in each.calls
        ),
        "look_ahead_recall_by_layer": _recall(routes),
        "same_experts_by_modality": _by_modality(routes),
    }


def use_counts_of(routes: Routes) -> UseCounts:
    """How often each expert is used, for a policy to begin with."""
    size = (len(routes.layers), routes.num_experts)
    used = {phase: np.zeros(size) for phase in Phase}
    count = dict.fromkeys(Phase, 0)
    for each in routes.passes:
        if each.phase is Phase.THINKING and not each.num_heard:
            continue  # a system prompt is no question
        count[each.phase] += 1
        for call in each.calls:
            used[each.phase][routes.layers.index(call.layer), call.experts] += 1
    return UseCounts(
        listen=used[Phase.THINKING] / max(count[Phase.THINKING], 1),
        speak=used[Phase.SPEAKING] / max(count[Phase.SPEAKING], 1),
    )


def _overlap(routes: Routes) -> dict[str, float | None]:
    """Share of a row's experts that the row before it of the same kind chose too, in one layer."""
    found: dict[str, list[float]] = {kind.name.lower(): [] for kind in Modality}
    for kind in Modality:
        for layer in routes.layers:
            rows: list[tuple[int, set[int]]] = []
            for each in routes.passes:
                for call in each.calls:
                    if call.layer == layer:
                        own = call.ids[call.modality == kind]
                        rows += [(each.turn, set(row.tolist())) for row in own]
            for (turn, before), (turn_now, now) in pairwise(rows):
                if turn == turn_now:
                    found[kind.name.lower()].append(len(before & now) / routes.top_k)
    return {kind: _mean(values) for kind, values in found.items()}


def _lru_hits(routes: Routes, num_slots: int) -> float | None:
    """Share of the demands of decode steps that one pool under LRU has, hints aside."""
    residency = replay(
        Routes(
            layers=routes.layers,
            num_experts=routes.num_experts,
            top_k=routes.top_k,
            record_bytes=routes.record_bytes,
            passes=[each for each in routes.passes if each.phase is Phase.SPEAKING],
            source=routes.source,
        ),
        lambda num_keys, _: Lru(num_keys),
        ReplaySettings(num_slots=num_slots, look_ahead=False),
    )
    total = residency.hits.sum() + residency.misses.sum()
    return float(residency.hits.sum() / total) if total else None


def _lru_hits_per_layer(routes: Routes, num_slots: int) -> float | None:
    """The same with a pool for each layer: no layer can push another one out."""
    hits = total = 0
    for layer in routes.layers:
        pool: OrderedDict[int, None] = OrderedDict()
        for each in routes.passes:
            if each.phase is not Phase.SPEAKING:
                continue
            for expert in (e for call in each.calls if call.layer == layer for e in call.experts):
                total += 1
                if expert in pool:
                    hits += 1
                    pool.move_to_end(expert)
                    continue
                if len(pool) >= num_slots:
                    pool.popitem(last=False)
                pool[expert] = None
    return hits / total if total else None


def _recall(routes: Routes) -> dict[str, float | None]:
    """Share of a row's experts that the layer before predicted, in decode steps."""
    found: dict[int, list[float]] = {layer: [] for layer in routes.layers[1:]}
    for each in routes.passes:
        if each.phase is not Phase.SPEAKING:
            continue
        for before, call in pairwise(each.calls):
            if len(before.predicted) != len(call.ids) or call.layer not in found:
                continue
            for guess, ids in zip(before.predicted.tolist(), call.ids.tolist(), strict=True):
                found[call.layer].append(len(set(guess) & set(ids)) / routes.top_k)
    return {str(layer): _mean(values) for layer, values in found.items()}


def _by_modality(routes: Routes) -> dict[str, float | None]:
    """Overlap of how two kinds of row use a layer's experts: 1 the same, 0 apart."""
    use = np.zeros((len(Modality), len(routes.layers), routes.num_experts))
    for each in routes.passes:
        for call in each.calls:
            for kind in Modality:
                row = routes.layers.index(call.layer)
                np.add.at(use[kind, row], call.ids[call.modality == kind].ravel(), 1)
    rows = use.sum(axis=2)
    share = use / np.maximum(rows, 1)[:, :, None]
    pairs = [(Modality.HEARD, Modality.SPOKEN), (Modality.HEARD, Modality.WRITTEN)]
    pairs.append((Modality.SPOKEN, Modality.WRITTEN))
    overlaps = {}
    for one, other in pairs:
        both = (rows[one] > 0) & (rows[other] > 0)  # a prefill does not run the last router
        name = f"{one.name.lower()} and {other.name.lower()}"
        overlaps[name] = _mean(np.minimum(share[one], share[other]).sum(axis=1)[both])
    return overlaps


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None
