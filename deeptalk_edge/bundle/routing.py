"""`routing.npz`: how a checkpoint used its experts on a corpus, for the pager to begin with.

listen       (L, E), share of the prefilled questions that touch an expert
speak        (L, E), share of the decode steps that choose it
succession   (L, E, E), how likely j is chosen in the step after one that chose i, in one layer
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.arrays import read_arrays
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import DecoderSpec

ROUTING = "routing.npz"


@dataclass(frozen=True, slots=True)
class Routing:
    """The arrays of the file, float32 shares."""

    listen: NDArray[np.float32]
    speak: NDArray[np.float32]
    succession: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write the file."""
        np.savez(path, listen=self.listen, speak=self.speak, succession=self.succession)


def planned_bytes(spec: DecoderSpec) -> int:
    """The size of the file, but for a kilobyte of headers."""
    values = len(spec.moe_layers) * spec.num_experts * (2 + spec.num_experts)
    return 4 * values + 1024


def read_routing(path: Path, spec: DecoderSpec) -> Routing:
    """Raises ArtifactError if the file does not fit the model or holds anything but shares."""
    size = (len(spec.moe_layers), spec.num_experts)
    forms = {
        "listen": (np.float32, size),
        "speak": (np.float32, size),
        "succession": (np.float32, (*size, spec.num_experts)),
    }
    arrays = read_arrays(path, forms)
    for name, values in arrays.items():
        if not (np.isfinite(values).all() and (values >= 0).all() and (values <= 1.001).all()):
            raise ArtifactError(f"{path}: {name}: expected shares from 0 to 1")
    return Routing(**arrays)
