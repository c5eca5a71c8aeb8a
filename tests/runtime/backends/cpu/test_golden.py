"""The golden check of CPU bundles: the kernels against a reference with their rounded weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.runtime.backends.cpu.backend import DECODER_TOLERANCE
from deeptalk_edge.runtime.backends.open import open_backend
from deeptalk_edge.runtime.settings import ConversationSettings
from tests.native.cpu import built
from tests.runtime.backends.cpu.random_bundles import WIDE, random_checkpoint

DEEP = replace(
    WIDE,
    decoder=replace(WIDE.decoder, num_layers=10, num_experts=16, top_k=4, routed_scale=4.0),
)
"""A model in which another choice of expert, by a rounding, moves the logits by a fifth."""

OUTPUTS = ("text_logits", "code_logits")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the library that the sources build."""
    built.install(monkeypatch)


@pytest.fixture(scope="module", params=["int8", "int4:64"])
def deep_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Shared: never write to it."""
    place = tmp_path_factory.mktemp("deep")
    profile = load_profile("cpu-int8").with_precision([f"experts={request.param}"])
    checkpoint = random_checkpoint(DEEP, place / "checkpoint")
    export_bundle(checkpoint, place / "bundle", ExportSettings(profile=profile))
    return Bundle.open(place / "bundle")


def golden_of(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    with np.load(bundle.file("golden.npz")) as file:
        return dict(file)


def error_of(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check(bundle: Bundle) -> None:
    open_backend(bundle, "cpu", ConversationSettings.of(bundle).for_backend()).close()


def test_a_deep_model_passes_although_rounding_moves_its_logits_far(deep_bundle: Bundle) -> None:
    golden = golden_of(deep_bundle)
    moved = [error_of(golden[f"native_{name}"], golden[name]) for name in OUTPUTS]
    assert min(moved) > DECODER_TOLERANCE
    check(deep_bundle)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_bundle_without_the_kernels_golden_outputs_is_refused(
    deep_bundle: Bundle, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ArtifactError, match=f"native_{name} missing; export the bundle again"):
        check(without(f"native_{name}", deep_bundle, tmp_path))


def without(name: str, bundle: Bundle, place: Path) -> Bundle:
    """A copy whose golden.npz lacks an array."""
    copy = shutil.copytree(bundle.path, place / "bundle")
    golden = golden_of(bundle)
    del golden[name]
    np.savez(copy / "golden.npz", **golden)  # type: ignore[arg-type]
    return Bundle(copy, bundle.manifest)
