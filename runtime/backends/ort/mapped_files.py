"""Copies the weights that ONNX Runtime leaves file-mapped into anonymous memory.

If another process truncates a mapped file, the next read ends this process with SIGBUS; neither a
private mapping nor an open descriptor protects from that. ONNX Runtime maps external data and packs
most matrices into its own memory. This module reads the rest (21 MB of 1,346 MB for the official
encoder, ONNX Runtime 1.23 and 1.32) and puts it at the same addresses.

Pieces of more than `MOST_BYTES` stay mapped. At the official size that is only the table of
embeddings in float32 (1.08 GB, a fifth of the graphs' memory).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from deeptalk_edge.errors import ArtifactError

MOST_BYTES = 256_000_000

_MREMAP_MAYMOVE, _MREMAP_FIXED = 1, 2
_MAP_FAILED = ctypes.c_void_p(-1).value

log = logging.getLogger(__name__)


class _Mapping(NamedTuple):
    start: int
    num_bytes: int
    offset: int
    file: str


def own_mapped_files(directory: Path) -> int:
    """Replace this process's mappings of a directory's files; returns the number of bytes.

    If the system does not allow it, the files stay mapped, with a line in the log. Raises
    ArtifactError if a file is shorter than its mapping.
    """
    replaced = 0
    for mapping in list(_mappings({str(path.resolve()) for path in directory.iterdir()})):
        if mapping.num_bytes > MOST_BYTES:
            log.info("%s: %d bytes stay mapped", mapping.file, mapping.num_bytes)
            continue
        try:
            _replace(mapping)
        except OSError as error:
            log.warning("%s stays mapped (%s); do not change it in place", mapping.file, error)
            continue
        replaced += mapping.num_bytes
    return replaced


def _mappings(files: set[str]) -> Iterator[_Mapping]:
    """Return the mappings of some files, from /proc. Source: proc_pid_maps(5)."""
    try:
        lines = Path("/proc/self/maps").read_bytes().splitlines()
    except OSError as error:
        log.warning("files stay mapped (%s); do not change a bundle in place", error)
        return
    for line in lines:
        span, _, offset, _, _, *name = line.split(maxsplit=5)
        if name and (file := os.fsdecode(name[0])) in files:
            start, end = (int(edge, 16) for edge in span.split(b"-"))
            yield _Mapping(start, end - start, int(offset, 16), file)


def _replace(mapping: _Mapping) -> None:
    """Read the bytes from the file, because reading the mapping may end the process, and move them
    over the mapping in one step, so that concurrent readers always see the same bytes."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    size, writable = ctypes.c_size_t(mapping.num_bytes), mmap.PROT_READ | mmap.PROT_WRITE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = _checked(libc.mmap(None, size, writable, flags, -1, ctypes.c_long(0)))
    try:
        _fill(
            memoryview((ctypes.c_char * mapping.num_bytes).from_address(memory)).cast("B"), mapping
        )
        place = ctypes.c_void_p(mapping.start)
        how = _MREMAP_MAYMOVE | _MREMAP_FIXED
        _checked(libc.mremap(ctypes.c_void_p(memory), size, size, how, place))
    except BaseException:
        libc.munmap(ctypes.c_void_p(memory), size)
        raise


def _checked(address: int | None) -> int:
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return address


def _fill(memory: memoryview, mapping: _Mapping) -> None:
    """Fill with the file's bytes and with zeros after its end, as in a mapping."""
    fd = os.open(mapping.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < len(memory) and (got := os.preadv(fd, [memory[done:]], mapping.offset + done)):
            done += got
    finally:
        os.close(fd)
    if len(memory) - done >= mmap.PAGESIZE:
        raise ArtifactError(
            f"{mapping.file}: cut to {mapping.offset + done} bytes while it was loaded; copy the "
            "bundle again, under another name, and rename it"
        )
