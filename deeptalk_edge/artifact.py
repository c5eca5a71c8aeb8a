"""The files between verbs: written whole or not at all, and checked by size and hash when read.

A directory is built under a hidden name beside its place and renamed at the end; whatever goes
wrong on the way (an error, a full disk, Ctrl-C) leaves nothing behind.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deeptalk_edge.errors import ArtifactError, DoesNotFit

_CHUNK_BYTES = 1 << 20


@contextmanager
def staged_directory(place: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a directory to fill; when the block ends well, it stands at `place`.

    Raises ArtifactError if `place` exists and `replace` is not set, DoesNotFit if the disk is full.
    """
    if place.exists() and not replace:
        raise ArtifactError(f"{place} exists already; choose another place or pass --force")
    place.parent.mkdir(parents=True, exist_ok=True)
    staging = place.with_name(f".{place.name}.partial-{os.getpid()}")
    staging.mkdir()
    try:
        yield staging
        swap_directory(staging, place)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFit(
                f"{place}: the disk is full; nothing was kept. Free room, then try again"
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def swap_directory(staging: Path, place: Path) -> None:
    """Move `staging` to `place`; what stood there goes only when the new one has its name."""
    if not place.exists():
        staging.rename(place)
        return
    old = place.with_name(f".{place.name}.old-{os.getpid()}")
    place.rename(old)
    try:
        staging.rename(place)
    except OSError:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_atomically(place: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it."""
    staging = place.with_name(f".{place.name}.partial-{os.getpid()}")
    try:
        staging.write_bytes(content)
        staging.replace(place)
    finally:
        staging.unlink(missing_ok=True)


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
