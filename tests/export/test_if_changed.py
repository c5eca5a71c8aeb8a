"""`export --if-changed` keeps an up-to-date bundle and replaces a stale one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deeptalk_edge.bundle.manifest import read_manifest
from tests.export.checkpoints import write_checkpoint
from tests.places import ROOT

Export = Callable[[], str]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the package, to change."""
    place = tmp_path / "tree"
    for folder in ("deeptalk_edge", "export", "calibration", "devices", "runtime"):
        shutil.copytree(
            ROOT / folder, place / folder, symlinks=True, ignore=shutil.ignore_patterns("*.so")
        )
    return place


@pytest.fixture
def export(tree: Path, tmp_path: Path) -> Export:
    """Export; returns the bundle's input hashes and the manifest's time."""
    write_checkpoint(tmp_path / "checkpoint")
    flags = ["--if-changed", "-o", str(tmp_path / "bundle")]

    def run() -> str:
        cli = [sys.executable, "-m", "deeptalk_edge.cli"]
        command = [*cli, "export", str(tmp_path / "checkpoint"), *flags]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        subprocess.run(command, cwd=tree, env=environment, check=True)
        place = tmp_path / "bundle" / "manifest.json"
        return f"{read_manifest(place).inputs} {place.stat().st_mtime_ns}"

    return run


def test_a_bundle_is_kept_for_equal_inputs_and_made_again_for_others(
    export: Export, tree: Path, tmp_path: Path
) -> None:
    first = export()
    assert export() == first
    with (tree / "export/graphs/codec.py").open("a") as file:
        file.write("# another exporter\n")
    second = export()
    assert second.split()[0] != first.split()[0]
    with (tree / "deeptalk_edge/model/spec.py").open("a") as file:
        file.write("# another definition\n")
    third = export()
    assert third.split()[0] != second.split()[0]
    generation = tmp_path / "checkpoint" / "generation_config.json"
    generation.write_text(generation.read_text() + "\n" if generation.is_file() else "{}")
    assert export().split()[0] != third.split()[0]


def test_a_damaged_bundle_is_made_again(export: Export, tmp_path: Path) -> None:
    first = export()
    (tmp_path / "bundle" / "golden.npz").write_bytes(b"")
    assert export() != first
    assert (tmp_path / "bundle" / "golden.npz").stat().st_size > 0
