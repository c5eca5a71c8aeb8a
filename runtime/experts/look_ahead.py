"""A guess at the next layer's experts, a whole attention before its router speaks.

The next layer's router is applied to this layer's normalised input: the residual stream changes
little from one layer to the next. It is a hint, never a decision. Source: FATE, arXiv 2502.12224.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def folded_gates(gates: Mapping[int, Array], norms: Mapping[int, Array]) -> dict[int, Array]:
    """Each routing layer's successor as a router (E, C) of this layer's normalised input.

    `gates` (E, C) and `norms` (C,), the weights of the norm in front of the router, by layer. The
    input comes scaled by its own layer's norm; the next one's takes its place.
    """
    layers = sorted(gates)
    return {
        layer: (gates[after] * (norms[after] / norms[layer])).astype(np.float32)
        for layer, after in pairwise(layers)
    }


class LookAhead:
    """Predicts the experts of the layer behind one that routes now."""

    def __init__(self, gates: Mapping[int, Array], top_k: int) -> None:
        self._gates = {layer: np.ascontiguousarray(gate.T) for layer, gate in gates.items()}
        self._top_k = top_k

    def predict(self, layer: int, normed: Array) -> NDArray[np.int64] | None:
        """Experts (N, top_k) of the next routing layer for inputs (N, C); None behind the last."""
        gate = self._gates.get(layer)
        if gate is None:
            return None
        scores = normed @ gate
        return np.argpartition(-scores, self._top_k - 1, axis=1)[:, : self._top_k]
