"""Does a bundle do what its reference does? Array by array, each with a tolerance, all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import ParityError
from deeptalk_edge.export.golden import golden_inputs, golden_outputs
from deeptalk_edge.runtime.bundle import Bundle

Array = NDArray[Any]

TOLERANCES = {
    "features": 1e-4,
    "hidden": 1e-4,
    "text_logits": 1e-4,
    "code_logits": 1e-4,
    "sound": 1e-5,
}
"""Greatest absolute difference allowed to float32 graphs. Sums run in another order than in torch,
which costs about 1e-6 of the largest value; a wrong scale, mask or permutation more than 1e-2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far one array is from its reference."""

    name: str
    greatest: float
    """Greatest absolute difference; infinite where the shapes differ or a value is not finite."""
    tolerance: float

    @property
    def is_within(self) -> bool:
        return self.greatest <= self.tolerance

    def __str__(self) -> str:
        sign = "<=" if self.is_within else "exceeds"
        return f"{self.name}: {self.greatest:.2e} {sign} {self.tolerance:.0e}"


def bundle_differences(
    place: Path, reference: Mapping[str, Array], tolerances: Mapping[str, float] = TOLERANCES
) -> list[Difference]:
    """Run a bundle on its golden inputs and compare with what a reference made of the same inputs.

    `reference` has the names of golden.npz's outputs; those it lacks are not compared.
    """
    manifest = Bundle.open(place).manifest
    found = golden_outputs(place, manifest, golden_inputs(manifest.model))
    return [difference(name, found[name], reference[name], tolerances[name]) for name in reference]


def difference(name: str, found: Array, expected: Array, tolerance: float) -> Difference:
    """Compare one array."""
    greatest = float("inf")
    if found.shape == expected.shape and np.isfinite(found).all():
        greatest = float(np.abs(found - expected).max(initial=0.0))
    return Difference(name=name, greatest=greatest, tolerance=tolerance)


def check(differences: Iterable[Difference]) -> None:
    """Raises ParityError, naming every array that is too far from its reference."""
    far = [str(one) for one in differences if not one.is_within]
    if far:
        raise ParityError("the graphs differ from their reference: " + "; ".join(far))
