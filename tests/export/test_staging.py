"""An export replaces only a bundle, and refuses other places before the work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from deeptalk_edge.cli import main
from deeptalk_edge.errors import ArtifactError, EdgeError, SettingsError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.export.staging import JOURNAL, check_place, resumable_directory
from tests.disks import make_read_only, small_disk
from tests.export.checkpoints import write_checkpoint


def _bundle(place: Path) -> Path:
    """A directory that looks like a bundle of another format."""
    place.mkdir(parents=True)
    manifest = {"format": 99, "files": {"experts.bin": {}, "head.onnx": {}}}
    (place / "manifest.json").write_text(json.dumps(manifest))
    for name in ("experts.bin", "head.onnx", "manifest.json.minisig"):
        (place / name).touch()
    return place


def _replace(place: Path, *, fails: bool = False) -> None:
    with resumable_directory(place, "inputs", replace=True) as staging:
        staging.step("new", lambda: (staging.path / "new").write_bytes(b"new"))
        if fails:
            raise ArtifactError("it came to nothing")


def _tree(place: Path) -> list[tuple[str, bytes]]:
    return sorted(
        (str(path.relative_to(place)), path.read_bytes() if path.is_file() else b"")
        for path in place.rglob("*")
    )


def test_a_bundle_of_any_format_is_replaced(tmp_path: Path) -> None:
    _replace(_bundle(tmp_path / "bundle"))
    assert _tree(tmp_path) == [("bundle", b""), ("bundle/new", b"new")]


def test_a_replacement_that_fails_leaves_the_old_bundle(tmp_path: Path) -> None:
    place = _bundle(tmp_path / "bundle")
    before = _tree(tmp_path)
    with pytest.raises(ArtifactError, match="it came to nothing"):
        _replace(place, fails=True)
    assert _tree(tmp_path) == before


def _foreign(root: Path) -> Path:
    (root / "x").mkdir()
    (root / "x" / "mine").touch()
    return root / "x"


def _file(root: Path) -> Path:
    (root / "x").write_bytes(b"mine")
    return root / "x"


def _empty(root: Path) -> Path:
    (root / "x").mkdir()
    return root / "x"


def _link(root: Path) -> Path:
    (root / "x").symlink_to(_bundle(root / "real"))
    return root / "x"


def _dangling(root: Path) -> Path:
    (root / "x").symlink_to("absent")
    return root / "x"


def _with_more(root: Path) -> Path:
    (_bundle(root / "x") / "notes.txt").touch()
    return root / "x"


def _broken_manifest(root: Path) -> Path:
    (_bundle(root / "x") / "manifest.json").write_text("[" * 100_000)
    return root / "x"


def _checkpoint_beside(root: Path) -> Path:
    (root / "x").mkdir()
    (root / "x" / "manifest.json").write_text('{"files": "config.json"}')
    (root / "x" / "config.json").touch()
    return root / "x"


def _fifo(root: Path) -> Path:
    (root / "x").mkdir()
    os.mkfifo(root / "x" / "manifest.json")
    return root / "x"


@pytest.mark.parametrize(
    "make",
    [
        _foreign, _file, _empty, _link, _dangling, _with_more, _broken_manifest,
        _checkpoint_beside, _fifo,
    ],
)  # fmt: skip
def test_a_place_that_is_not_a_bundle_is_not_replaced(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    place = make(tmp_path)
    before = _tree(tmp_path)
    with pytest.raises(ArtifactError, match="choose another place"):
        _replace(place)
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("spelt", [".", "..", "../bundle", "absent/..", "/", "/proc"])
def test_the_working_directory_is_not_replaced(
    spelt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(_bundle(tmp_path / "bundle"))
    before = _tree(tmp_path)
    with pytest.raises(ArtifactError, match="choose another place"):
        _replace(Path(spelt))
    assert _tree(tmp_path) == before


def test_a_mounted_bundle_is_not_replaced(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        (disk / "manifest.json").write_text('{"files": {"x": {}}}')
        with pytest.raises(ArtifactError, match="is a mount point"):
            _replace(disk)
        assert [path.name for path in disk.iterdir()] == ["manifest.json"]


def test_a_place_that_appears_during_the_export_is_not_replaced(tmp_path: Path) -> None:
    def export() -> None:
        with resumable_directory(tmp_path / "bundle", "inputs"):
            _bundle(tmp_path / "bundle")

    with pytest.raises(ArtifactError, match="exists already"):
        export()
    assert len(_tree(tmp_path / "bundle")) == 4


def test_a_hidden_directory_that_is_not_ours_is_not_cleared(tmp_path: Path) -> None:
    hidden = tmp_path / ".bundle.partial"
    hidden.mkdir()
    (hidden / "mine").touch()
    with pytest.raises(ArtifactError, match="holds something else"):
        _replace(tmp_path / "bundle")
    assert _tree(tmp_path) == [(".bundle.partial", b""), (".bundle.partial/mine", b"")]


def test_an_empty_directory_of_an_export_killed_at_once_is_used(tmp_path: Path) -> None:
    (tmp_path / ".bundle.partial").mkdir()
    with resumable_directory(tmp_path / "bundle", "inputs") as staging:
        staging.step("new", lambda: (staging.path / "new").write_bytes(b"new"))
    assert (tmp_path / "bundle" / "new").read_bytes() == b"new"


def test_the_half_written_journal_of_a_killed_export_is_not_in_the_bundle(tmp_path: Path) -> None:
    hidden = tmp_path / ".bundle.partial"
    hidden.mkdir()
    (hidden / JOURNAL).write_text(json.dumps({"inputs": "inputs", "done": {}}))
    (hidden / f".{JOURNAL}.partial-0a1b2c3d").write_text('{"inp')
    with resumable_directory(tmp_path / "bundle", "inputs") as staging:
        staging.step("new", lambda: (staging.path / "new").write_bytes(b"new"))
        assert list(staging.files()) == ["new"]


def test_an_export_that_fails_leaves_no_directory_on_the_way(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="it came to nothing"):
        _replace(tmp_path / "a" / "b" / "bundle", fails=True)
    assert _tree(tmp_path) == []


def test_a_place_is_refused_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        make_read_only(disk)
        for place, error in ((tmp_path, ArtifactError), (disk / "bundle", SettingsError)):
            with pytest.raises(error, match=r"exists already|read-only"):
                export_bundle(tmp_path / "no_checkpoint", place, ExportSettings())
    with pytest.raises(EdgeError, match="is a file"):
        check_place(_file(tmp_path) / "bundle", replace=False)


def test_a_bundle_that_holds_an_input_is_not_replaced(tmp_path: Path) -> None:
    place = _bundle(tmp_path / "bundle")
    settings = ExportSettings(replace=True, snac=place / "head.onnx")
    with pytest.raises(SettingsError, match="which the export reads"):
        export_bundle(tmp_path / "no_checkpoint", place, settings)
    assert (place / "head.onnx").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-o", "/proc/bundle"], "cannot be written"),
        (["-o", "."], "exists already; choose another place or pass --force"),
        (["-o", ".", "--force"], "is the current directory"),
        (["-o", "bundle", "--plugin", "nope.so"], "nope.so: no such file"),
    ],
)
def test_a_wrong_place_is_one_line(
    flags: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint").place
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["export", str(checkpoint), *flags]) == 1
    line = capsys.readouterr().err.splitlines()[-1].rpartition("\r")[2]
    assert line.startswith("deeptalk-edge: ")
    assert said in line
    assert list((tmp_path / "here").iterdir()) == []
