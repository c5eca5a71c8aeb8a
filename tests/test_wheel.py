"""A wheel has the product with its data files, and no bench or test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.places import ROOT

LIST = """
from setuptools import Distribution
dist = Distribution({"script_name": "setup.py"})
dist.parse_config_files(["pyproject.toml"])
build = dist.get_command_obj("build_py")
build.ensure_finalized()
for package, module, _ in build.find_all_modules():
    print(f"{package}.{module}")
for package, _, _, names in build.data_files:
    print(*(f"{package}/{name}" for name in names), sep="\\n")
"""


@pytest.fixture(scope="module")
def packed() -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LIST], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_no_bench_and_no_test_is_packed(packed: set[str]) -> None:
    assert not {name for name in packed if ".bench" in name or name.startswith("tests")}


def test_every_module_of_the_product_is_packed(packed: set[str]) -> None:
    rooms = ("runtime", "export", "devices", "calibration", "training", "deeptalk_edge")
    for path in (path for room in rooms for path in (ROOT / room).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[:2] == ("deeptalk_edge", "bench"):
            continue
        name = ".".join(parts if parts[0] == "deeptalk_edge" else ("deeptalk_edge", *parts))
        assert name in packed, name


@pytest.mark.parametrize(
    ("package", "kind"),
    [
        ("deeptalk_edge.devices", "devices/profiles/*.toml"),
        ("deeptalk_edge.devices", "devices/schemas/*.json"),
        ("deeptalk_edge.training.stages", "training/stages/*.toml"),
    ],
)
def test_every_data_file_is_packed(packed: set[str], package: str, kind: str) -> None:
    files = sorted(ROOT.glob(kind))
    assert files
    folder = ROOT / Path(*package.split(".")[1:])
    missing = {f"{package}/{path.relative_to(folder)}" for path in files} - packed
    assert not missing
