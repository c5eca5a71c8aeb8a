"""Records are read without the page cache, or the reason is reported."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.runtime.experts import record_file
from deeptalk_edge.runtime.experts.record_file import PAGE_BYTES, RecordFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    place = tmp_path / "experts.bin"
    place.write_bytes(os.urandom(8 * PAGE_BYTES))
    return place


def read(file: RecordFile, offset: int, num_bytes: int) -> bytes:
    with mmap.mmap(-1, num_bytes) as memory, memoryview(memory) as view:
        got = file.read_into(offset, view)
        return bytes(view[:got])


@pytest.mark.parametrize("direct", [True, False])
def test_a_read_returns_the_files_bytes(path: Path, direct: bool) -> None:
    file = RecordFile(path, direct=direct)
    content = path.read_bytes()
    assert file.size_bytes == len(content)
    assert read(file, 2 * PAGE_BYTES, 3 * PAGE_BYTES) == content[2 * PAGE_BYTES : 5 * PAGE_BYTES]
    assert read(file, 7 * PAGE_BYTES, 2 * PAGE_BYTES) == content[7 * PAGE_BYTES :]
    file.close()


def test_a_file_system_that_refuses_direct_reads_is_read_buffered_with_a_reason(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def refuse(place: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(place, flags)

    monkeypatch.setattr(os, "open", refuse)
    file = RecordFile(path)
    assert not file.is_direct
    assert file.why_buffered == "the file system refuses O_DIRECT (Invalid argument)"
    assert read(file, 0, PAGE_BYTES) == path.read_bytes()[:PAGE_BYTES]
    file.close()


def test_a_direct_read_that_fails_at_the_first_try_is_not_tried_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_read, calls = os.preadv, []

    def refuse_once(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_read(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse_once)
    file = RecordFile(path)
    assert file.why_buffered == "a direct read failed (Invalid argument)"
    assert read(file, PAGE_BYTES, PAGE_BYTES) == path.read_bytes()[PAGE_BYTES : 2 * PAGE_BYTES]
    file.close()


def test_a_file_system_that_caches_direct_reads_is_reported(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = iter([False, True])  # before the probe, and after it
    monkeypatch.setattr(record_file, "_is_cached", lambda fd: next(cached))
    file = RecordFile(path)
    assert file.why_buffered == "the file system caches in spite of O_DIRECT"
    assert read(file, 0, PAGE_BYTES) == path.read_bytes()[:PAGE_BYTES]
    file.close()


def test_every_buffered_read_is_dropped_from_the_page_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice: list[tuple[int, int, int]] = []
    file = RecordFile(path, direct=False)
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *args: advice.append(args))
    read(file, 2 * PAGE_BYTES, PAGE_BYTES)
    read(file, 7 * PAGE_BYTES, 2 * PAGE_BYTES)  # of which the file has one
    assert advice == [
        (2 * PAGE_BYTES, PAGE_BYTES, os.POSIX_FADV_DONTNEED),
        (7 * PAGE_BYTES, PAGE_BYTES, os.POSIX_FADV_DONTNEED),
    ]
    file.close()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.bin: No such file"):
        RecordFile(tmp_path / "none.bin")


def test_closing_leaves_no_descriptor_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    RecordFile(path).close()
    RecordFile(path, direct=False).close()
    assert len(os.listdir("/proc/self/fd")) == before
