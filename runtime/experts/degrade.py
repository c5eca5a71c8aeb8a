"""Trading accuracy for reads: never by default, always counted.

bonus   adds a share of the router's score range to resident experts, for the choice only; the gates
        come from the unchanged softmax and the best experts are never replaced. Source:
        cache-conditional experts, arXiv 2412.00099
skip    leaves out an absent expert that has a small share of its token's gates

With either, answers depend on the pool and on timing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class DegradeSettings:
    """Limits of the trade; the defaults trade nothing."""

    bonus: float = 0.0
    """Bonus of resident experts, as a share of the token's score range."""
    protected: int = 2
    """Number of a token's best experts that are never replaced."""
    skip_below: float = 0.0
    """Least share of its token's gates for an absent expert; it is left out below that."""

    def __post_init__(self) -> None:
        if not 0 <= self.bonus <= 1 or not 0 <= self.skip_below < 1 or self.protected < 1:
            raise ValueError(f"{self}: bonus 0 to 1, skip_below 0 to 1, protected from 1")


class Degrade:
    """Changes routing to save reads, and counts the changes. One per engine."""

    def __init__(self, settings: DegradeSettings, gates: Mapping[int, Array]) -> None:
        """`gates` are the routers (E, C) by layer; only a bonus needs them."""
        self._settings = settings
        self._gates = gates
        self.num_uses = self.num_substituted = self.num_skipped = 0
        self._kept_mass = self._full_mass = 0.0

    @property
    def kept_share(self) -> float | None:
        """Gate mass of the experts that ran, as a share of the router's choice; None before any
        ran."""
        return self._kept_mass / self._full_mass if self._full_mass else None

    def report(self) -> dict[str, Any]:
        """Return all counters so far, for JSON."""
        return {
            "uses": self.num_uses,
            "substituted": self.num_substituted,
            "skipped": self.num_skipped,
            "kept_share": self.kept_share,
        }

    def apply(self, layer: int, ids: Ids, weights: Array, normed: Array, resident: Mask) -> Mask:
        """Change ids and weights, both (N, k), in place, for inputs (N, C) and residency (E,).
        Returns the mask (N, k) of the experts that run; the weights of the others are 0."""
        self.num_uses += ids.size
        self._full_mass += float(weights.sum())
        if self._settings.bonus:
            self._prefer(ids, weights, normed @ self._gates[layer].T, resident)
        share = weights / weights.sum(axis=1, keepdims=True)
        runs: Mask = resident[ids] | (share >= self._settings.skip_below)
        weights[~runs] = 0.0
        self.num_skipped += int((~runs).sum())
        self._kept_mass += float(weights.sum())
        return runs

    def _prefer(self, ids: Ids, weights: Array, logits: Array, resident: Mask) -> None:
        """Replace experts that are neither among the best nor resident if a resident one scores
        close."""
        span = np.ptp(logits, axis=1)[:, None]
        scores = logits + self._settings.bonus * span * resident.astype(np.float32)
        best = np.argsort(-weights, axis=1, kind="stable")
        protected = np.take_along_axis(ids, best[:, : self._settings.protected], axis=1)
        np.put_along_axis(scores, protected, np.inf, axis=1)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, : ids.shape[1]]
        # Whatever scale the model gives its gates, a replacement gets the scale of the best expert.
        gates = np.exp(logits - logits.max(axis=1, keepdims=True))
        first = np.take_along_axis(ids, best[:, :1], axis=1)
        scale = weights.max(axis=1, keepdims=True) / np.take_along_axis(gates, first, axis=1)
        for row, (wanted, found) in enumerate(zip(ids.tolist(), chosen.tolist(), strict=True)):
            gone = [place for place, expert in enumerate(wanted) if expert not in found]
            come = [expert for expert in found if expert not in wanted]
            ids[row, gone] = come
            weights[row, gone] = gates[row, come] * scale[row]
            self.num_substituted += len(gone)
