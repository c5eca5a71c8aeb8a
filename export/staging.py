"""An export that can be killed and continued: a directory, and a journal of the steps done in it.

The directory has a hidden name beside the bundle's place until all is there. A step is a name and a
function that writes files; when it ends, its files are on the disk and the journal says their
sizes, hashes and what the step returned. The next export of the same inputs takes finished
steps from the journal once their files have been checked, and runs the others again. Other inputs,
a newer exporter included, start over. An error that continuing cannot mend leaves nothing.

Two exports never write one place: the directory is locked. A bundle is replaced by a bundle, and
nothing else is replaced.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deeptalk_edge.bundle.manifest import MANIFEST, FileEntry
from deeptalk_edge.bundle.signature import signature_place
from deeptalk_edge.errors import ArtifactError, BackendError
from deeptalk_edge.files import (
    check_directory,
    check_file,
    check_replaceable,
    is_full,
    refusing,
    sha256_of,
    staged_file,
    swap_directory,
    write_error,
)

JOURNAL = "journal.json"


class Staging:
    """The directory in the making."""

    def __init__(self, path: Path, inputs: str) -> None:
        self.path = path
        self._inputs = inputs
        for left in path.glob(f".{JOURNAL}.*"):  # of an export that was killed as it wrote one
            left.unlink()
        self._done: dict[str, dict[str, Any]] = self._read_journal()
        self._forget_damaged()
        self._write_journal()  # from now on the directory is known to be ours

    def step(self, name: str, write: Callable[[], Any]) -> Any:
        """What `write` returned, now or in the export that was killed; plain JSON.

        It writes its files below `path`, and may find there what a killed run left of them.
        """
        if name not in self._done:
            kept = self.files()
            returned = write()
            new = {str(path.relative_to(self.path)): path for path in self._present()}
            new = {file: path for file, path in new.items() if file not in kept}
            for path in new.values():
                _flush(path)
            entries = {
                file: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
                for file, path in new.items()
            }
            self.note(name, returned, entries)
        return self._done[name]["returned"]

    def note(self, name: str, returned: Any, files: Mapping[str, Any] | None = None) -> None:
        """Write a step into the journal."""
        self._done[name] = {"returned": returned, "files": dict(files or {})}
        self._write_journal()

    def _write_journal(self) -> None:
        content = json.dumps({"inputs": self._inputs, "done": self._done})
        with staged_file(self.path / JOURNAL) as file:
            file.write(content.encode())

    def noted(self, name: str) -> Any | None:
        """What was noted under a name, if anything."""
        return self._done[name]["returned"] if name in self._done else None

    def files(self) -> dict[str, FileEntry]:
        """Every finished file, by its path below the directory."""
        return {
            file: FileEntry(**entry)
            for step in self._done.values()
            for file, entry in step["files"].items()
        }

    def drop(self, directory: str) -> None:
        """Remove a directory of intermediate files."""
        shutil.rmtree(self.path / directory, ignore_errors=True)

    def _present(self) -> list[Path]:
        return sorted(
            path for path in self.path.rglob("*") if path.is_file() and path.name != JOURNAL
        )

    def _read_journal(self) -> dict[str, Any]:
        try:
            content = json.loads((self.path / JOURNAL).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = {}
        if content.get("inputs") == self._inputs:
            return dict(content["done"])
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return {}

    def _forget_damaged(self) -> None:
        """Steps whose files are not as they were are to be done again."""
        for name, step in list(self._done.items()):
            try:
                for file, entry in step["files"].items():
                    check_file(self.path / file, size_bytes=entry["bytes"], sha256=entry["sha256"])
            except ArtifactError:
                del self._done[name]


def check_place(place: Path, *, replace: bool) -> Path:
    """Refuse a bundle's place before the work; returns it as an absolute path.

    Raises ArtifactError if something is there that an export may not replace: without `replace`
    anything, with it all but a bundle. SettingsError if nothing can be written there.
    """
    place = Path(os.path.abspath(place))  # "." and ".." have no name
    if os.path.lexists(place) and not replace:
        raise ArtifactError(f"{place} exists already; choose another place or pass --force")
    if os.path.lexists(place):
        check_replaceable(place, names := _names_in_bundle(place))
        if not names:
            raise ArtifactError(
                f"{place} is empty and no bundle; remove it, or choose another place"
            )
    check_directory(place.parent)
    partial = _partial(place)
    if os.path.lexists(partial) and not _is_ours(partial):
        raise ArtifactError(
            f"{partial}: an export would write there, but it holds something else; move it away"
        )
    return place


def _partial(place: Path) -> Path:
    return place.with_name(f".{place.name}.partial")


def _is_ours(partial: Path) -> bool:
    """Whether it is what a killed export left."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    return (partial / JOURNAL).is_file() or not any(partial.iterdir())


def _names_in_bundle(place: Path) -> set[str]:
    """The files of the bundle that is there, of whatever format; empty if it is no bundle."""
    manifest = place / MANIFEST
    try:
        content = json.loads(manifest.read_bytes()) if manifest.is_file() else {}
        names = set(content["files"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return set()
    return {MANIFEST, signature_place(manifest).name, *names}


@contextmanager
def resumable_directory(place: Path, inputs: str, *, replace: bool = False) -> Iterator[Staging]:
    """Yield the staging directory of `place`; when the block ends well, it is renamed to it.

    `inputs` is a hash of all that the result depends on. Raises what `check_place` raises,
    ArtifactError if another export is writing the place, DoesNotFit if the disk is full.
    """
    place = check_place(place, replace=replace)
    path = _partial(place)
    made = [above for above in path.parents if not above.exists()]
    with refusing(place):
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(
                f"{place}: another export is writing it; wait for that one or choose another place"
            ) from None
        with _cleared_on_error(path, place):
            yield Staging(path, inputs)
            check_place(place, replace=replace)  # something may have come meanwhile
            (path / JOURNAL).unlink()
            swap_directory(path, place)
    finally:
        os.close(handle)
        for above in made:
            with suppress(OSError):  # it holds the bundle, or what was done of it
                above.rmdir()


@contextmanager
def _cleared_on_error(path: Path, place: Path) -> Iterator[None]:
    """Ctrl-C and a builder that gave up keep what is done; other errors keep nothing."""
    try:
        yield
    except (KeyboardInterrupt, BackendError):
        raise
    except BaseException as error:
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError) and is_full(error):
            raise write_error(place, error) from error
        raise


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
