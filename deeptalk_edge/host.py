"""What this machine is asked for: advice to the kernel, threads, and what it says of itself.

advice    is advice: a kernel that refuses it computes the same, slower or with more memory
threads   a machine that refuses one is an error that names the way out
"""

from __future__ import annotations

import logging
import mmap
import os
import platform
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deeptalk_edge.errors import BackendError

MORE_THREADS = "raise the limit (ulimit -u, systemd's TasksMax, the container's pids limit)"
"""The way out where the system refuses threads."""

log = logging.getLogger(__name__)


def ask_for_huge_pages(memory: mmap.mmap) -> None:
    """Prefer huge pages for a mapping: a core reads twice as fast from them."""
    if hasattr(mmap, "MADV_HUGEPAGE"):  # of what Python was built with
        with _as_advice("huge pages"):
            memory.madvise(mmap.MADV_HUGEPAGE)


def give_memory_back(memory: mmap.mmap, start: int, num_bytes: int) -> None:
    """What lies in these pages of a mapping is not needed any more; refused, they stay."""
    with _as_advice("memory given back"):
        memory.madvise(mmap.MADV_DONTNEED, start, num_bytes)


def drop_from_page_cache(fd: int, start: int, num_bytes: int) -> None:
    """Nobody will read these bytes of a file through the page cache soon."""
    with _as_advice("page cache"):
        os.posix_fadvise(fd, start, num_bytes, os.POSIX_FADV_DONTNEED)


def yield_to_other_threads(steps: int) -> None:
    """Lower the priority of the calling thread: on Linux each one has a niceness of its own."""
    with _as_advice("priority"):
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, niceness + steps)


def start_thread(thread: threading.Thread) -> None:
    """Raises BackendError if the system refuses."""
    try:
        thread.start()
    except RuntimeError as error:  # all that Python says of a refusal
        raise BackendError(
            f"the system refuses to start the thread {thread.name} ({error}); {MORE_THREADS}"
        ) from error


def processor() -> str:
    """Its name, or its architecture where the kernel has no name for it."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpuinfo = ""
    found = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def peak_resident_mb() -> float | None:
    """The most memory that this process has had, weights mapped from files included; None if the
    kernel does not say. Not from getrusage, whose peak begins with the parent's."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else None


@contextmanager
def _as_advice(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.debug("%s: the kernel does not take this advice (%s)", what, error)
