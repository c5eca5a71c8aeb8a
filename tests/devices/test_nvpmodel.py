"""Power modes go by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeptalk_edge.devices import nvpmodel
from deeptalk_edge.devices.nvpmodel import (
    ActiveMode,
    active_mode,
    parse_modes,
    parse_query,
    parse_status,
)
from deeptalk_edge.devices.reading import read_file
from deeptalk_edge.errors import SettingsError
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


def test_a_mode_number_that_the_board_lacks_is_not_a_mode() -> None:
    assert parse_status("pmode:0007", parse_modes(NVPMODEL_CONF)) is None


def test_without_its_files_the_reason_is_given(tmp_path: Path) -> None:
    reading = active_mode(tmp_path)
    assert reading.value is None
    assert "nvpmodel.conf: no such file" in (reading.why or "")


@given(st.text(max_size=200))
def test_garbage_is_not_a_mode(text: str) -> None:
    for found in (parse_query(text), parse_status(text, parse_modes(text))):
        assert found is None or found.name


FAKE = """#!/bin/sh
if [ "$1" = -m ]; then [ -w {state} ] && echo "$2" > {state}; exit 0; fi
case "$(cat {state})" in 0) name=15W;; 2) name=MAXN_SUPER;; esac
echo "NV Power Mode: $name"; cat {state}
"""


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A board whose nvpmodel stores its mode in a file; an unknown mode leaves the old one."""
    state = tmp_path / "state"
    state.write_text("0")
    program = tmp_path / "nvpmodel"
    program.write_text(FAKE.format(state=state))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    conf = plant(tmp_path / "root", ORIN_NANO) / "etc/nvpmodel.conf"
    monkeypatch.setattr(
        "deeptalk_edge.devices.nvpmodel.read_file",
        lambda path: read_file(conf if path.name == "nvpmodel.conf" else path),
    )
    return state


def test_a_mode_is_set_by_its_name_and_read_back(board: Path) -> None:
    nvpmodel.set_mode("MAXN_SUPER")
    assert board.read_text().strip() == "2"


def test_a_mode_that_is_not_applied_is_an_error(board: Path) -> None:
    (board.parent / "nvpmodel").write_text("#!/bin/sh\n[ $1 = -m ] || echo NV Power Mode: 15W\n")
    with pytest.raises(SettingsError, match="MAXN_SUPER: was set, but the board is in 15W"):
        nvpmodel.set_mode("MAXN_SUPER")


def test_a_mode_that_the_board_lacks_is_refused_with_those_that_it_has(board: Path) -> None:
    with pytest.raises(SettingsError, match="'10W': this board has 15W, 25W, MAXN_SUPER"):
        nvpmodel.set_mode("10W")
