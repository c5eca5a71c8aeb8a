"""Power modes go by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeptalk_edge.devices.nvpmodel import (
    ActiveMode,
    active_mode,
    parse_modes,
    parse_query,
    parse_status,
)
from tests.devices.trees import NVPMODEL_CONF, ORIN_NANO, plant


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("NV Power Mode: MAXN_SUPER\n2\n", ActiveMode("MAXN_SUPER", 2)),
        ("NVPM WARN: fan mode is not set!\nNV Power Mode: MODE_15W\n1", ActiveMode("MODE_15W", 1)),
        ("NV Power Mode: 25W", ActiveMode("25W", None)),
        ("NV Fan Mode:quiet", None),
    ],
)
def test_the_query_names_the_mode(text: str, mode: ActiveMode | None) -> None:
    assert parse_query(text) == mode


def test_the_status_file_has_a_number_and_the_configuration_its_name(tmp_path: Path) -> None:
    assert parse_modes(NVPMODEL_CONF) == {0: "15W", 1: "25W", 2: "MAXN_SUPER"}
    assert active_mode(plant(tmp_path, ORIN_NANO)).value == ActiveMode("15W", 0)


def test_a_number_that_the_board_lacks_is_no_mode() -> None:
    assert parse_status("pmode:0007", parse_modes(NVPMODEL_CONF)) is None


def test_without_its_files_the_reason_is_given(tmp_path: Path) -> None:
    reading = active_mode(tmp_path)
    assert reading.value is None
    assert "nvpmodel.conf: no such file" in (reading.why or "")


@given(st.text(max_size=200))
def test_garbage_is_no_mode(text: str) -> None:
    for found in (parse_query(text), parse_status(text, parse_modes(text))):
        assert found is None or found.name
