"""The files that we read and write: refused before the work, written whole or not at all.

file        absent or regular: written under a hidden name beside its place, then renamed; the old
            file's mode and owner stay. A link: what it points to is written. Anything else, a
            device or a FIFO, is written into and keeps its node
directory   built under a hidden name beside its place, then renamed; it replaces a directory of
            its own kind and nothing else, and a replacement that fails puts the old one back
input       is never an output as well; a FIFO without another end is an error after a bounded wait
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import select
import shutil
import stat
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from deeptalk_edge.errors import ArtifactError, DoesNotFit, EdgeError, SettingsError

STDOUT = Path("-")
"""As the name of an output: standard output."""

FIFO_WAIT_S = 10.0
"""How long we wait for the other end of a FIFO."""

_CHUNK_BYTES = 1 << 20
_NAME_BYTES = 200  # of a place's name in a hidden one: file systems allow 255
_SCRATCH_MARK = ".deeptalk-edge-scratch"

_FULL = {
    errno.ENOSPC: "free room on the disk",
    errno.EDQUOT: "free room in your quota",
    errno.EFBIG: "raise the limit (`ulimit -f`) or name another disk",
}
_WAYS_OUT = {
    errno.EISDIR: "name a file",
    errno.ENOENT: "make its directory, or name another place",
    errno.ENOTDIR: "make its directory, or name another place",
    errno.ENXIO: "it has no reader; start the reader first",
    errno.EPIPE: "its reader has gone; start it again",
}

log = logging.getLogger(__name__)


# Outputs ------------------------------------------------------------------------------------------


class OutputFile:
    """A file in the making: `commit` gives it its name, `discard` leaves what was there before.

    Not thread-safe. Every method raises OSError as the system does.
    """

    def __init__(self, place: Path, *, is_new: bool = False, mode: int = 0o666) -> None:
        """`is_new`: the file has its own name from the start, and must not exist yet; `mode` is
        that of a file that does not replace another."""
        self.place = place
        self._target = place
        self._staging: Path | None = None
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        if is_new:
            self._handle = os.open(place, flags, mode)
        elif place == STDOUT:
            self._handle = os.dup(1)
        elif (old := _stat(place)) is not None and not stat.S_ISREG(old.st_mode):
            self._handle = _open_node(place, old)
        else:
            self._target = Path(os.path.realpath(place))
            if old is not None and not os.access(self._target, os.W_OK):
                raise PermissionError(errno.EACCES, "Permission denied", str(place))
            self._staging = hidden_beside(self._target, "partial")
            self._handle = os.open(self._staging, flags, mode)
            if old is not None:
                with suppress(PermissionError):
                    os.fchown(self._handle, old.st_uid, old.st_gid)
                os.fchmod(self._handle, stat.S_IMODE(old.st_mode) & 0o777)
        self.is_seekable = is_new or self._staging is not None

    def write(self, content: bytes) -> None:
        """Append all of it; nothing is buffered."""
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self._handle, rest) :]

    def write_at(self, place: int, content: bytes) -> None:
        """Put all of it where it belongs; for a file that `is_seekable`."""
        rest = memoryview(content)
        while rest:
            num_bytes = os.pwrite(self._handle, rest, place)
            rest, place = rest[num_bytes:], place + num_bytes

    def truncate(self, num_bytes: int) -> None:
        """Drop what was written after `num_bytes`."""
        os.ftruncate(self._handle, num_bytes)

    @property
    def is_closed(self) -> bool:
        return self._handle < 0

    def commit(self) -> None:
        """Close the file under its name; where that fails it keeps its hidden one, which the
        error names."""
        self._close()
        if self._staging is not None:
            try:
                self._staging.replace(self._target)
            except OSError as error:
                said = f"{error.strerror}; what was written is in {self._staging}"
                raise OSError(error.errno, said, str(self.place)) from error

    def discard(self) -> None:
        """Close the file and remove it, unless it is a device, a FIFO or standard output."""
        self._close()
        if self.is_seekable:
            (self._staging or self._target).unlink(missing_ok=True)

    def _close(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)


def write_file(place: Path, content: bytes) -> None:
    """Write a whole file.

    Raises DoesNotFit if the disk is full, SettingsError if it cannot be written else; what was
    there before stays.
    """
    with refusing(place), staged_file(place) as file:
        file.write(content)


@contextmanager
def staged_file(place: Path) -> Iterator[OutputFile]:
    """A file that has its name when the block ends well. Raises OSError as the system does."""
    file = OutputFile(place)
    try:
        yield file
        file.commit()
    except BaseException:
        if not file.is_closed:
            file.discard()
        raise


def check_output(place: Path) -> None:
    """Refuse a place before the work whose result is to go there.

    Raises SettingsError if no file can be written there; DoesNotFit if the disk takes not even an
    empty one.
    """
    if place == STDOUT:
        return
    with refusing(place):
        old = _stat(place)
        if old is not None and stat.S_ISDIR(old.st_mode):
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        if old is None or stat.S_ISREG(old.st_mode):
            OutputFile(place).discard()


def check_directory(place: Path) -> None:
    """Refuse a directory that is to be made or written to.

    Raises SettingsError if that cannot be done.
    """
    above = place
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise write_error(place, NotADirectoryError(errno.ENOTDIR, f"{above} is a file"))
    if not os.access(above, os.W_OK | os.X_OK):
        raise SettingsError(
            f"{place}: cannot be written ({above} is read-only for this user); name another place"
        )


def check_inputs_stay(inputs: Iterable[Path], outputs: Iterable[Path]) -> None:
    """Refuse outputs that are inputs, also by a link or a second name, or that are one file.

    Raises SettingsError naming both.
    """
    known: dict[tuple[int, int] | str, Path] = {}
    for path in inputs:
        if identity := _identity(path):
            known[identity] = path
    for output in outputs:
        if output.exists() and not output.is_file():
            continue  # a device holds nothing
        target = _identity(output) or os.path.realpath(output)
        if target in known:
            raise SettingsError(
                f"{output}: is the same file as {known[target]} and would overwrite it; name "
                "another place"
            )
        known[target] = output


@contextmanager
def side_output(place: Path) -> Iterator[None]:
    """Write a side output: a place that cannot be written is a warning, not an error."""
    try:
        yield
    except (OSError, SettingsError, DoesNotFit) as error:
        said = write_error(place, error) if isinstance(error, OSError) else error
        log.warning("%s", said)


def silence_stdout() -> None:
    """What is printed from now on, and what is buffered, goes nowhere: the interpreter's last flush
    cannot fail any more."""
    with suppress(OSError, ValueError):  # closed, or not a file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextmanager
def refusing(place: Path, refused: type[EdgeError] = SettingsError) -> Iterator[None]:
    """Turn what the system says about `place` into the error of `write_error`."""
    try:
        yield
    except OSError as error:
        raise write_error(place, error, refused) from error


def write_error(place: Path, error: OSError, refused: type[EdgeError] = SettingsError) -> EdgeError:
    """What a user is told: DoesNotFit where there is no room, `refused` else."""
    said = error.strerror or str(error)
    if error.errno in _FULL:
        return DoesNotFit(f"{place}: cannot be written ({said}); {_FULL[error.errno]}")
    way_out = _WAYS_OUT.get(error.errno or 0, "name another place")
    return refused(f"{place}: cannot be written ({said}); {way_out}")


def is_full(error: OSError) -> bool:
    """Whether the system said that there is no room."""
    return error.errno in _FULL


def hidden_beside(place: Path, what: str) -> Path:
    """An unused hidden name beside `place`: `.NAME.what-RANDOM`."""
    name = os.fsdecode(os.fsencode(place.name)[:_NAME_BYTES])
    return place.with_name(f".{name}.{what}-{secrets.token_hex(4)}")


def _stat(place: Path) -> os.stat_result | None:
    """Of what is there, links followed; None if nothing is."""
    try:
        return place.stat()
    except FileNotFoundError:
        return None


def _identity(path: Path) -> tuple[int, int] | None:
    """Of a regular file: the same by all of its names."""
    with suppress(OSError):
        found = path.stat()
        if stat.S_ISREG(found.st_mode):
            return found.st_dev, found.st_ino
    return None


def _open_node(place: Path, old: os.stat_result) -> int:
    """Open a device or a FIFO; an ENXIO says that the FIFO has no reader."""
    flags, end_s = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC, time.monotonic() + FIFO_WAIT_S
    while True:
        try:
            handle = os.open(place, flags)
            os.set_blocking(handle, True)
            return handle
        except OSError as error:
            if error.errno != errno.ENXIO or not stat.S_ISFIFO(old.st_mode):
                raise
            if time.monotonic() > end_s:
                raise
        time.sleep(0.02)


# Directories --------------------------------------------------------------------------------------


@contextmanager
def staged_directory(place: Path, *, replaces: Collection[str] = ()) -> Iterator[Path]:
    """Yield a directory to fill; when the block ends well, it has the name `place`.

    It replaces a directory that holds no other files than `replaces`. Raises ArtifactError if
    something else is there, SettingsError if the place cannot be written, DoesNotFit if the disk
    is full.
    """
    check_replaceable(place, replaces)
    staging = hidden_beside(place, "partial")
    with refusing(place):
        staging.mkdir(parents=True)
    try:
        yield staging
        check_replaceable(place, replaces)  # it may have come meanwhile
        swap_directory(staging, place)
    except OSError as error:
        if is_full(error):
            raise write_error(place, error) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_replaceable(place: Path, names: Collection[str]) -> None:
    """Refuse to replace anything but an ordinary directory that holds no other files than `names`.

    Raises ArtifactError saying what is there instead.
    """
    if not os.path.lexists(place):
        return
    if found := _not_ours(place, names):
        raise ArtifactError(f"{place} {found}; move it away yourself, or choose another place")


def _not_ours(place: Path, names: Collection[str]) -> str | None:
    """What forbids that a directory is replaced."""
    if place.is_symlink():
        return "is a link"
    if not place.is_dir():
        return "is no directory"
    if os.path.ismount(place):
        return "is a mount point"
    here = Path.cwd()
    if any(place.samefile(above) for above in (here, *here.parents)):
        return "is the current directory, or holds it"
    strangers = sorted(path.name for path in place.iterdir() if path.name not in names)
    if strangers:
        return f"holds {strangers[0]}, which is no part of what may be replaced"
    return None


def swap_directory(staging: Path, place: Path) -> None:
    """Move `staging` to `place`; what was there goes when the new one has its name, and comes back
    when that fails."""
    if not place.exists():
        staging.rename(place)
        return
    old = hidden_beside(place, "old")
    try:
        place.rename(old)
        staging.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_directory(place: Path, *, keep: bool = False) -> Iterator[None]:
    """A directory whose files are removed at the end; a mark tells it from anybody's own.

    Raises ArtifactError if `place` holds files and no mark.
    """
    was_there = place.exists()
    place.mkdir(parents=True, exist_ok=True)
    mark = place / _SCRATCH_MARK
    if not mark.exists() and any(place.iterdir()):
        raise ArtifactError(
            f"{place}: scratch files go there and are removed, but it holds others; name an empty "
            "or a new directory"
        )
    mark.touch()
    try:
        yield
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
            if was_there:
                place.mkdir(exist_ok=True)


# Inputs -------------------------------------------------------------------------------------------


def open_input(path: Path) -> BinaryIO:
    """Open a file to read.

    Raises OSError as the system does, also if a FIFO has no writer within `FIFO_WAIT_S`.
    """
    found = path.stat()
    # A pipe that has no name, `<(...)` of a shell, has a writer already.
    if not (stat.S_ISFIFO(found.st_mode) and os.path.exists(os.path.realpath(path))):
        return path.open("rb")
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not select.select([handle], [], [], FIFO_WAIT_S)[0]:
        os.close(handle)
        raise TimeoutError(
            errno.ETIMEDOUT, "this FIFO has no writer; start the writer first", str(path)
        )
    os.set_blocking(handle, True)
    return os.fdopen(handle, "rb")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_file(path: Path, *, size_bytes: int, sha256: str | None) -> None:
    """Check a file against its entry; a hash of None checks the size alone.

    Raises ArtifactError naming the file, what was expected and what was found.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: missing; export or copy the bundle again")
    found_bytes = path.stat().st_size
    if found_bytes != size_bytes:
        raise ArtifactError(
            f"{path}: {found_bytes} bytes, expected {size_bytes}; export or copy the bundle again"
        )
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise ArtifactError(
            f"{path}: altered (SHA-256 {found[:12]}..., expected {sha256[:12]}...); "
            "export or copy the bundle again"
        )
