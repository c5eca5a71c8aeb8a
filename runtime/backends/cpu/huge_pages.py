"""Memory for streamed weights: anonymous, on huge pages, from which a core reads twice as fast."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge import host
from deeptalk_edge.errors import ArtifactError, DoesNotFit

_HUGE_PAGE_BYTES = 2 << 20


def huge_array(num_bytes: int) -> NDArray[np.uint8]:
    """Return writable zeros, (num_bytes,); the system gives each page when it is first touched.

    Raises DoesNotFit if the system refuses.
    """
    # One huge page more, to align the start wherever the kernel maps it.
    size = num_bytes + _HUGE_PAGE_BYTES
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:  # the latter beyond 64 bits
        raise DoesNotFit(f"{size / 1e9:.2f} GB of memory: {error}") from error
    host.ask_for_huge_pages(memory)
    array: NDArray[np.uint8] = np.frombuffer(memory, np.uint8)
    start = -array.ctypes.data % _HUGE_PAGE_BYTES
    return array[start : start + num_bytes]


def read_into(path: Path, offset: int, place: NDArray[Any]) -> None:
    """Fill an array of bytes from a file.

    Raises ArtifactError if the file ends too early or cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            view = place.data.cast("B")
            done = 0
            while done < len(view) and (count := file.readinto(view[done:])):
                done += count
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error})") from error
    if done < len(view):
        raise ArtifactError(
            f"{path}: ends at {offset + done}, {len(view)} bytes were expected at {offset}; copy "
            "the bundle again"
        )
