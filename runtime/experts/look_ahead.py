"""Predicts the next layer's experts one attention block before its router runs.

It applies the next layer's router to this layer's normalised input, because the residual stream
changes little between layers. The prediction is a hint, never a decision. Source: FATE, arXiv
2502.12224.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def folded_gates(gates: Mapping[int, Array], norms: Mapping[int, Array]) -> dict[int, Array]:
    """Fold the router of each layer's successor to take this layer's normalised input: (E, C).

    `gates` (E, C) and `norms` (C,), the weights of the norm before the router, are by layer. The
    input is scaled by its own layer's norm; the fold replaces that scale by the next layer's.
    """
    layers = sorted(gates)
    return {
        layer: (gates[after] * (norms[after] / norms[layer])).astype(np.float32)
        for layer, after in pairwise(layers)
    }


class LookAhead:
    """Predicts the experts of the layer after the one that routes now."""

    def __init__(self, gates: Mapping[int, Array], top_k: int) -> None:
        self._gates = {layer: np.ascontiguousarray(gate.T) for layer, gate in gates.items()}
        self._top_k = top_k

    def predict(self, layer: int, normed: Array) -> NDArray[np.int64] | None:
        """Experts (N, top_k) of the next routing layer for inputs (N, C); None after the last
        layer."""
        gate = self._gates.get(layer)
        if gate is None:
            return None
        scores = normed @ gate
        return np.argpartition(-scores, self._top_k - 1, axis=1)[:, : self._top_k]
