"""The runtime's bundle with random weights, for engines that page, and a file of small records."""

from __future__ import annotations

from pathlib import Path

import pytest

from deeptalk_edge.expert_record import ExpertRecord
from tests.experts.records import write_records
from tests.runtime.conftest import bundle, bundle_path, own_copy

__all__ = ["bundle", "bundle_path", "own_copy"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "experts.bin"


@pytest.fixture
def records(path: Path) -> list[ExpertRecord]:
    return write_records(path)
