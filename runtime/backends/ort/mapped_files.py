"""Makes the weights that ONNX Runtime leaves mapped memory of our own.

A mapped file that somebody cuts short ends the process with SIGBUS at the next read; neither a
private mapping nor an open descriptor protects from that. ONNX Runtime maps external data and
packs most matrices into memory of its own; what is left mapped afterwards (21 MB of 1,346 MB for
the official encoder, ONNX Runtime 1.23 and 1.32) is read here, and put at the same addresses.

Left mapped: a piece of more than `MOST_BYTES`, which at the official size is the table of
embeddings in float32 alone (1.08 GB, a fifth of what the graphs then hold).
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
    """Replace what this process maps of a directory's files; returns how many bytes.

    Where the system does not let us, the files stay mapped, with a line in the log. Raises
    ArtifactError if a file is shorter than what is mapped of it.
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
    """Those of some files, from /proc. Source: proc_pid_maps(5)."""
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
    """Read the bytes afresh, for reading the mapping may already end the process, and move them
    over it in one step: whoever reads there sees the same before and after."""
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
    """The file's bytes, and zeros behind its end to a whole page, as in a mapping."""
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
