"""Counters of the pager; one JSON object per turn."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any

from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.runtime.experts.residency import Cause, Residency

STALL_EDGES_MS = (0.3, 1, 3, 10, 30, 100, 300)
"""Lower bounds of the stall histogram's bins after the first, which begins at 0."""


class Telemetry:
    """Counters since the pager was made. The pager's lock guards them."""

    def __init__(self) -> None:
        self.moved_bytes = dict.fromkeys(Cause, 0)
        self.stall_ms = dict.fromkeys(Phase, 0.0)
        self.stalls = {phase: [0] * (len(STALL_EDGES_MS) + 1) for phase in Phase}
        self.num_late = 0
        """Hints that were demanded before their bytes were read."""
        self.num_all_resident = 0
        """Passes that made no requests, because every expert was resident."""
        self.num_retries = 0
        self.num_failures = 0

    def moved(self, cause: Cause, num_bytes: int) -> None:
        self.moved_bytes[cause] += num_bytes

    def stalled(self, phase: Phase, wait_ms: float) -> None:
        self.stall_ms[phase] += wait_ms
        self.stalls[phase][bisect_right(STALL_EDGES_MS, wait_ms)] += 1


def report(telemetry: Telemetry, residency: Residency) -> dict[str, Any]:
    """Return all counters so far, for JSON."""
    return {
        "slots": residency.table.num_slots,
        "hits": int(residency.hits.sum()),
        "misses": int(residency.misses.sum()),
        "hits_by_layer": residency.hits.tolist(),
        "misses_by_layer": residency.misses.tolist(),
        "all_resident_passes": telemetry.num_all_resident,
        "loads": {cause.value: count for cause, count in residency.num_loads.items()},
        "moved_bytes": {cause.value: count for cause, count in telemetry.moved_bytes.items()},
        "guesses_used": residency.num_used,
        "guesses_late": telemetry.num_late,
        "guesses_cancelled": residency.num_cancelled,
        "evictions": residency.num_evicted,
        "stall_ms": {phase.value: round(ms, 3) for phase, ms in telemetry.stall_ms.items()},
        "stalls": {phase.value: list(bins) for phase, bins in telemetry.stalls.items()},
        "stall_edges_ms": list(STALL_EDGES_MS),
        "retries": telemetry.num_retries,
        "failures": telemetry.num_failures,
    }


def since(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Difference of two reports: counters as differences, gauges as they are in `now`."""
    gone: dict[str, Any] = {}
    for name, value in now.items():
        if isinstance(value, Mapping):
            gone[name] = since(value, before[name])
        elif name in ("slots", "stall_edges_ms"):
            gone[name] = value
        elif isinstance(value, list):
            gone[name] = [a - b for a, b in zip(value, before[name], strict=True)]
        else:
            gone[name] = round(value - before[name], 3)
    return gone
