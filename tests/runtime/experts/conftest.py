"""A file of small records."""

from __future__ import annotations

from pathlib import Path

import pytest

from deeptalk_edge.bundle.expert_record import ExpertRecord
from tests.runtime.experts.records import write_records


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "experts.bin"


@pytest.fixture
def records(path: Path) -> list[ExpertRecord]:
    return write_records(path)
