"""Bundles of random weights that all tests share; each is exported once, at its first use."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from tests.runtime.backends.cpu.random_bundles import WIDE, random_checkpoint
from tests.runtime.speaking_checkpoint import write_speaking_checkpoint


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests: never write to it."""
    place = tmp_path_factory.mktemp("bundles")
    write_speaking_checkpoint(place / "checkpoint")
    export_bundle(place / "checkpoint", place / "bundle", ExportSettings())
    return place / "bundle"


@pytest.fixture(scope="session")
def tape_bundle(bundle_path: Path) -> Bundle:
    """The same checkpoint with the codec's noise tape."""
    place = bundle_path.parent / "tape"
    export_bundle(bundle_path.parent / "checkpoint", place, ExportSettings(codec_noise="tape"))
    return Bundle.open(place)


@pytest.fixture(scope="session")
def bundle(bundle_path: Path) -> Bundle:
    return Bundle.open(bundle_path)


@pytest.fixture(scope="session")
def int8_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that our kernels and ONNX Runtime run. Shared: never write to it."""
    place = tmp_path_factory.mktemp("int8")
    source = random_checkpoint(WIDE, place / "checkpoint")
    export_bundle(source, place / "bundle", ExportSettings(profile=load_profile("cpu-int8")))
    return Bundle.open(place / "bundle")


@pytest.fixture
def own_copy(bundle_path: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bundle_path, tmp_path / "bundle"))
