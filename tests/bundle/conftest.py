"""A bundle of random weights for our own kernels, which both backends run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from tests.runtime.backends.cpu.random_bundles import WIDE, random_checkpoint

_GENERATION = {
    "system": "Be brief.",
    "max_rows": 24,
    "context_rows": 400,
    "audio_top_k": 1,
    "repetition_penalty": 1.0,
}


@pytest.fixture(scope="session")
def sweep_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by all tests: never write to it or to its files."""
    place = tmp_path_factory.mktemp("sweep")
    checkpoint = random_checkpoint(WIDE, place / "checkpoint")
    generation = checkpoint / "generation_config.json"
    generation.write_text(json.dumps({"deeptalk": _GENERATION}))
    profile = load_profile("cpu-int8")
    export_bundle(checkpoint, place / "bundle", ExportSettings(profile=profile))
    return place / "bundle"
