"""Files are written whole or not at all, into devices and through links, never over an input."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from deeptalk_edge import files
from deeptalk_edge.errors import ArtifactError, DoesNotFit, EdgeError, SettingsError
from deeptalk_edge.files import (
    OutputFile,
    check_directory,
    check_inputs_stay,
    check_output,
    open_input,
    scratch_directory,
    side_output,
    staged_directory,
    staged_file,
    swap_directory,
    write_file,
)
from tests.disks import device_node, make_read_only, small_disk


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FIFO_WAIT_S", 0.1)


def _names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def test_a_new_file_has_the_usual_mode_and_a_replaced_one_keeps_its_own(tmp_path: Path) -> None:
    usual, own = tmp_path / "usual", tmp_path / "own"
    own.write_bytes(b"old")
    own.chmod(0o640)
    for place in (usual, own):
        write_file(place, b"new")
    (tmp_path / "plain").touch()
    assert usual.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert stat.S_IMODE(own.stat().st_mode) == 0o640
    assert own.read_bytes() == b"new"


def test_a_reader_of_the_old_file_keeps_it_whole(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"old")
    with place.open("rb") as reader:
        write_file(place, b"new and longer")
        assert reader.read() == b"old"


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_bytes(b"old")

    def interrupted() -> None:
        with staged_file(place) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert place.read_bytes() == b"old"
    assert _names(tmp_path) == ["file"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_followed_and_stays(is_there: bool, tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    folder.mkdir()
    link.symlink_to("folder/target")
    if is_there:
        (folder / "target").write_bytes(b"old")
    write_file(link, b"new")
    assert link.is_symlink()
    assert (folder / "target").read_bytes() == b"new"
    assert _names(folder) == ["target"]


def test_a_device_is_written_into_and_keeps_its_node(tmp_path: Path) -> None:
    null = device_node(tmp_path / "null", 3)
    check_output(null)
    write_file(null, b"content")
    assert stat.S_ISCHR(null.stat().st_mode)
    assert _names(tmp_path) == ["null"]


def test_a_full_device_is_an_error_and_keeps_its_node(tmp_path: Path) -> None:
    full = device_node(tmp_path / "full", 7)
    with pytest.raises(DoesNotFit, match=r"full: cannot be written \(No space left"):
        write_file(full, b"content")
    assert stat.S_ISCHR(full.stat().st_mode)


def test_a_fifo_is_written_into(tmp_path: Path) -> None:
    fifo, got = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()))
    reader.start()
    write_file(fifo, b"x" * 200_000)  # more than a pipe holds
    reader.join()
    assert got == [b"x" * 200_000]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_a_fifo_without_a_peer_does_not_block_forever(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(SettingsError, match="it has no reader; start the reader first"):
        write_file(fifo, b"content")
    with pytest.raises(TimeoutError, match="this FIFO has no writer"):
        open_input(fifo)


def test_an_input_may_be_a_fifo_or_a_pipe_without_a_name(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: fifo.write_bytes(b"named"))
    writer.start()
    with open_input(fifo) as file:
        assert file.read() == b"named"
    writer.join()
    end, start = os.pipe()
    os.write(start, b"unnamed")
    os.close(start)
    with open_input(Path(f"/dev/fd/{end}")) as file:
        assert file.read() == b"unnamed"
    os.close(end)


def test_a_name_of_the_greatest_length_and_of_any_bytes_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, os.fsdecode(b"\xff" * 250)):
        write_file(tmp_path / name, b"content")
        assert (tmp_path / name).read_bytes() == b"content"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder", "folder: cannot be written (Is a directory); name a file"),
        ("absent/file", "file: cannot be written (No such file or directory); make its directory"),
        ("file/file", "file: cannot be written (Not a directory); make its directory"),
        ("x" * 256, "cannot be written (File name too long); name another place"),
        ("loop", "loop: cannot be written (Too many levels of symbolic links)"),
    ],
)
def test_an_unwritable_place_is_refused_before_and_during_writing(
    name: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for write in (check_output, lambda place: write_file(place, b"content")):
        with pytest.raises(SettingsError) as caught:
            write(tmp_path / name)
        assert said in str(caught.value)
    assert _names(tmp_path) == ["file", "folder", "loop"]


def test_a_read_only_disk_is_refused_before_the_work(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        make_read_only(disk)
        for check in (check_output, check_directory):
            with pytest.raises(SettingsError, match="cannot be written"):
                check(disk / "new")


def test_a_disk_that_fills_keeps_the_old_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        write_file(disk / "file", b"old")
        with pytest.raises(DoesNotFit, match="free room on the disk"):
            write_file(disk / "file", b"x" * 200_000)
        assert (disk / "file").read_bytes() == b"old"
        assert _names(disk) == ["file"]


def test_a_check_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    for name in ("old", "new"):
        check_output(tmp_path / name)
    check_directory(tmp_path / "a" / "b")
    assert _names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_a_new_file_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        OutputFile(tmp_path / "old", is_new=True)


def test_a_side_output_that_fails_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with side_output(tmp_path / "absent" / "file"):
        write_file(tmp_path / "absent" / "file", b"content")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(ZeroDivisionError), side_output(tmp_path / "file"):
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["question", "by_link", "by_second_name", "folder/../question"])
def test_an_output_that_is_an_input_is_refused_by_any_name(name: str, tmp_path: Path) -> None:
    question = tmp_path / "question"
    question.write_bytes(b"question")
    (tmp_path / "folder").mkdir()
    (tmp_path / "by_link").symlink_to(question)
    os.link(question, tmp_path / "by_second_name")
    with pytest.raises(SettingsError, match="is the same file as"):
        check_inputs_stay([question], [tmp_path / name])
    check_inputs_stay([question], [tmp_path / "other"])


def test_two_outputs_are_two_files_and_a_device_may_be_both(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is the same file as"):
        check_inputs_stay([], [tmp_path / "new", tmp_path / "." / "new"])
    null = device_node(tmp_path / "null", 3)
    check_inputs_stay([null], [null, null])


# Directories --------------------------------------------------------------------------------------


def _write_directory(place: Path) -> None:
    with staged_directory(place, replaces=("part",)) as staging:
        (staging / "part").write_bytes(b"new")


def test_a_directory_replaces_one_of_the_same_kind(tmp_path: Path) -> None:
    for _ in range(2):
        _write_directory(tmp_path / "place")
    assert _names(tmp_path) == ["place"]
    assert (tmp_path / "place" / "part").read_bytes() == b"new"


def test_a_directory_replaces_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for name in ("foreign", "real", "here/below"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "foreign" / "mine").touch()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("absent")
    monkeypatch.chdir(tmp_path / "here" / "below")
    before = sorted(tmp_path.rglob("*"))
    for place, said in {
        tmp_path / "foreign": "holds mine",
        tmp_path / "file": "is no directory",
        tmp_path / "link": "is a link",
        tmp_path / "dangling": "is a link",
        tmp_path / "here": "is the current directory, or holds it",
        Path(".."): "is the current directory, or holds it",
        Path("/proc"): "is a mount point",
    }.items():
        with pytest.raises(ArtifactError, match=said):
            _write_directory(place)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_appeared_in_the_meantime_is_not_replaced(tmp_path: Path) -> None:
    place = tmp_path / "place"

    def interfere() -> None:
        with staged_directory(place):
            place.mkdir()
            (place / "mine").touch()

    with pytest.raises(ArtifactError, match="holds mine"):
        interfere()
    assert _names(place) == ["mine"]


def test_a_swap_that_fails_puts_the_old_directory_back(tmp_path: Path) -> None:
    place = tmp_path / "place"
    _write_directory(place)
    with pytest.raises(FileNotFoundError):
        swap_directory(tmp_path / "absent", place)
    assert (place / "part").read_bytes() == b"new"
    assert _names(tmp_path) == ["place"]


def test_only_our_scratch_files_are_removed(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for keep in (True, False):  # the second run finds the first run's files
        with scratch_directory(work, keep=keep):
            (work / "part").touch()
        assert (work / "part").exists() is keep
    work.mkdir(exist_ok=True)
    (work / "mine").touch()
    with pytest.raises(EdgeError, match="holds others"), scratch_directory(work):
        pass
    assert _names(work) == ["mine"]
