"""The experts' file, read without the page cache.

direct     O_DIRECT into page-aligned memory: the pool is the only copy, and the kernel's cache
           stays free for the rest of the system
buffered   if the file system refuses O_DIRECT, or accepts it and caches anyway: every read is
           followed by POSIX_FADV_DONTNEED, and `why_buffered` gives the reason
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Protocol

from deeptalk_edge import host
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.lifetime import Lifetime

PAGE_BYTES = 4096
_PROBE_BYTES = 1 << 16


class RecordSource(Protocol):
    """Source of the records' bytes. Several threads call `read_into` at once."""

    @property
    def name(self) -> str:
        """Name in messages."""

    @property
    def size_bytes(self) -> int:
        """Size of the whole file."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Read up to len(buffer) bytes; returns how many came. Raises OSError."""

    def close(self) -> None:
        """Close the source; no read follows."""


class RecordFile:
    """A file on disk. Offsets, lengths and buffers are whole pages."""

    def __init__(self, path: Path, *, direct: bool = True) -> None:
        """Open the file and find out whether it can be read directly."""
        self.name = str(path)
        self.why_buffered: str | None = None if direct else "as asked"
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
        except OSError as error:
            if not direct or not path.exists():
                raise ArtifactError(f"{path}: {error.strerror}; export the bundle again") from error
            self._fd = os.open(path, flags)
            self.why_buffered = f"the file system refuses O_DIRECT ({error.strerror})"
        self._lifetime = Lifetime(self.name, lambda: os.close(self._fd))
        self.size_bytes = os.fstat(self._fd).st_size
        if self.why_buffered is None and self.size_bytes >= PAGE_BYTES:  # else no record
            self._probe(path)

    @property
    def is_direct(self) -> bool:
        return self.why_buffered is None

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self._lifetime.check()
        num_bytes = os.preadv(self._fd, [buffer], offset)
        if not self.is_direct:
            host.drop_from_page_cache(self._fd, offset, num_bytes)
        return num_bytes

    def close(self) -> None:
        self._lifetime.close()

    def _probe(self, path: Path) -> None:
        """Read one page directly, and check that the page cache did not keep it."""
        buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with mmap.mmap(-1, _PROBE_BYTES) as memory, memoryview(memory) as view:
                host.drop_from_page_cache(buffered, 0, _PROBE_BYTES)
                was_cached = _is_cached(buffered)
                try:
                    os.preadv(self._fd, [view], 0)
                except OSError as error:
                    self.why_buffered = f"a direct read failed ({error.strerror})"
                else:
                    if not was_cached and _is_cached(buffered):
                        self.why_buffered = "the file system caches in spite of O_DIRECT"
            if self.why_buffered is not None:
                os.close(self._fd)
                self._fd, buffered = buffered, os.dup(buffered)
        finally:
            os.close(buffered)


def _is_cached(fd: int) -> bool:
    """Whether the first page is in the page cache. Also True for a file of another user and for one
    that cannot be mapped, where the kernel does not say."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        mapped = mmap.mmap(fd, PAGE_BYTES, flags=mmap.MAP_PRIVATE)
    except OSError:
        return True
    with mapped as page:
        state = ctypes.c_ubyte()
        first = ctypes.c_char.from_buffer(page)  # ctypes needs a writable mapping: a private one
        code = libc.mincore(
            ctypes.c_void_p(ctypes.addressof(first)),
            ctypes.c_size_t(PAGE_BYTES),
            ctypes.byref(state),
        )
        del first
        return code != 0 or bool(state.value & 1)
