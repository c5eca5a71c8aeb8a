"""The parity report: it passes what is equal, and names what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.errors import ParityError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.export.parity import bundle_differences, check, difference
from deeptalk_edge.parity import torch_outputs
from deeptalk_edge.runtime.bundle import Bundle
from tests.export.checkpoints import write_checkpoint
from tests.specs import SPECS

Array = NDArray[np.float32]
Reference = dict[str, Array]


@pytest.fixture(scope="module")
def bundle_and_reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    directory = tmp_path_factory.mktemp("parity")
    written = write_checkpoint(directory / "checkpoint", SPECS["yarn"])
    export_bundle(written.place, directory / "bundle", ExportSettings())
    delay = Bundle.open(directory / "bundle").manifest.codec.delay_samples
    return directory / "bundle", torch_outputs(written.model, written.codec, delay)


def test_a_bundle_agrees_with_torch_on_every_output(
    bundle_and_reference: tuple[Path, Reference],
) -> None:
    differences = bundle_differences(*bundle_and_reference)
    assert {one.name for one in differences} == set(bundle_and_reference[1])
    check(differences)


def test_golden_npz_holds_what_torch_computes(
    bundle_and_reference: tuple[Path, Reference],
) -> None:
    place, reference = bundle_and_reference
    golden = np.load(place / "golden.npz")
    for name, expected in reference.items():
        np.testing.assert_allclose(golden[name], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["features", "text_logits", "code_logits", "sound"])
def test_a_bundle_that_differs_is_named(
    bundle_and_reference: tuple[Path, Reference], name: str
) -> None:
    place, reference = bundle_and_reference
    with pytest.raises(ParityError, match=f"{name}: .* exceeds"):
        check(bundle_differences(place, {**reference, name: reference[name] + 1e-3}))


@pytest.mark.parametrize(
    "spoil",
    [lambda x: x[:-1], lambda x: np.full_like(x, np.nan), lambda x: x + np.inf],
    ids=["shape", "NaN", "infinite"],
)
def test_what_cannot_be_compared_differs_infinitely(spoil: Callable[[Array], Array]) -> None:
    found = difference("x", spoil(np.zeros(3, np.float32)), np.zeros(3, np.float32), 1.0)
    assert found.greatest == np.inf
    assert not found.is_within
