"""The folders are one package: reachable under one name, links and all."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

FOLDERS = ("calibration", "devices", "export", "runtime", "training")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_a_relative_link_under_the_import_root(folder: str) -> None:
    link = ROOT / "deeptalk_edge" / folder
    assert link.readlink() == Path("..") / folder
    assert importlib.util.find_spec(f"deeptalk_edge.{folder}") is not None


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_installed_folder_has_no_generic_name(folder: str) -> None:
    command = [sys.executable, "-I", "-c", f"import {folder}"]
    finished = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in finished.stderr
