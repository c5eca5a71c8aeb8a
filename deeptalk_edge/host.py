"""What this machine is asked for: advice to the kernel, threads, and what it says of itself and of
the memory that is left.

advice    is advice: a kernel that refuses it computes the same, slower or with more memory
threads   a machine that refuses one is an error that names the way out
memory    what the tightest of the nested control groups leaves, and the machine itself; page cache
          that the kernel can take back is not in use
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
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from deeptalk_edge.errors import BackendError, DoesNotFit

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
    """Tell the kernel that these bytes of a file are not needed in the page cache."""
    with _as_advice("page cache"):
        os.posix_fadvise(fd, start, num_bytes, os.POSIX_FADV_DONTNEED)


def yield_to_other_threads(steps: int) -> None:
    """Lower the priority of the calling thread: on Linux each thread has its own niceness."""
    with _as_advice("priority"):
        thread = threading.get_native_id()
        niceness = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, niceness + steps)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


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
    found = re.search(r"^model name\s*: (.+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def peak_resident_mb() -> float | None:
    """The most memory that this process has had, weights mapped from files included; None if the
    kernel does not say. Not from getrusage, whose peak begins with the parent's."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", _read(Path("/proc/self/status")), re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else None


@contextmanager
def _as_advice(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.debug("%s: the kernel refuses this advice (%s)", what, error)


# Memory -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """What the system says of its memory."""

    available_bytes: int
    """Of the machine, or what a control group leaves of its limit if that is less."""
    stalled_percent: float | None
    """Share of the last minute in which some task waited for memory, if the kernel counts it."""


def read_memory(root: Path = Path("/")) -> MemoryReading:
    """Read /proc and the control groups below `root`.

    Raises DoesNotFit if the system does not say what is available.
    """
    meminfo = (root / "proc/meminfo").read_text(encoding="utf-8")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo, re.MULTILINE)
    if found is None:
        raise DoesNotFit(f"{root / 'proc/meminfo'}: no MemAvailable; name the pool's size instead")
    left = [group.left(place) for group, place in _memory_groups(root)]
    available = min([int(found[1]) * 1024, *(most for most in left if most is not None)])
    pressure = _read(root / "proc/pressure/memory")
    some = re.search(r"some .*avg60=([\d.]+)", pressure)
    return MemoryReading(max(available, 0), float(some[1]) if some else None)


@dataclass(frozen=True, slots=True)
class _GroupFiles:
    """What the files of a memory control group are called. Source: the kernel's cgroup-v2.rst and
    cgroup-v1/memory.rst."""

    limits: tuple[str, ...]
    used: str
    reclaimable: tuple[str, ...]
    """Entries of memory.stat, this group's children included."""

    def left(self, place: Path) -> int | None:
        """Bytes that the group may still take; None if it has no limit."""
        limits = [text for name in self.limits if (text := _read(place / name)).isdigit()]
        used = _read(place / self.used)
        if not limits or not used.isdigit():
            return None
        stat = dict(line.split(maxsplit=1) for line in _read(place / "memory.stat").splitlines())
        cache = sum(int(stat.get(name, 0)) for name in self.reclaimable)
        return min(map(int, limits)) - max(int(used) - cache, 0)


# memory.high kills no process: above it the kernel slows a group until it has given memory back.
_V2 = _GroupFiles(
    ("memory.max", "memory.high"),
    "memory.current",
    ("active_file", "inactive_file", "slab_reclaimable"),
)
_V1 = _GroupFiles(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)

_USUAL_MOUNTS = (
    "1 0 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
    "2 1 0:2 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory",
)
"""Where the system does not say."""


def _memory_groups(root: Path) -> Iterator[tuple[_GroupFiles, Path]]:
    """The groups that bound this process: its own, and each above it that can be seen."""
    names = _own_groups(root)
    for files, top, mount in _mounted_groups(root):
        steps = _steps_below(top, names.get(files, "/"))
        for length in range(len(steps), -1, -1):
            yield files, mount.joinpath(*steps[:length])


def _steps_below(top: str, name: str) -> tuple[str, ...]:
    """The way from the group at the top of a mount to a group; none to one out of its sight."""
    group = PurePosixPath(name)
    if ".." in group.parts or not group.is_relative_to(top):
        return ()
    return group.relative_to(top).parts


def _own_groups(root: Path) -> dict[_GroupFiles, str]:
    """This process's group in each hierarchy. Source: cgroups(7)."""
    names = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            names[_V2] = name
        elif "memory" in controllers.split(","):
            names[_V1] = name
    return names


def _mounted_groups(root: Path) -> Iterator[tuple[_GroupFiles, str, Path]]:
    """Each hierarchy of groups with the group at its top, and where that is mounted; a container
    may have its own group there. Source: proc_pid_mountinfo(5)."""
    mounts = _read(root / "proc/self/mountinfo").splitlines() or _USUAL_MOUNTS
    for line in mounts:
        mount, _, kind = line.partition(" - ")
        top, place = mount.split()[3:5]
        if kind.startswith("cgroup2 "):
            yield _V2, top, root / place.lstrip("/")
        elif kind.startswith("cgroup ") and "memory" in kind.split()[-1].split(","):
            yield _V1, top, root / place.lstrip("/")


def _read(path: Path) -> str:
    """A small file of the kernel's, or nothing if it is not there."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
