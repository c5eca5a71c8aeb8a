"""Disk, memory, limits and the container around us."""

from __future__ import annotations

import re
import resource
import shutil
from collections.abc import Iterator

from deeptalk_edge import host
from deeptalk_edge.devices.finding import Examined, Finding, ok, unknown
from deeptalk_edge.devices.reading import read_file

_MIB, _GIB = 2**20, 2**30
_LEAST_FREE_BYTES = 2 * _GIB
_LEAST_MEMLOCK_BYTES = 64 * _MIB
_LEAST_PROCESSES = 256


def disk(examined: Examined) -> Iterator[Finding]:
    from deeptalk_edge.devices.measure import why_no_direct_reads

    free = shutil.disk_usage(examined.place).free
    is_enough = free >= _LEAST_FREE_BYTES
    yield Finding(
        check="free space",
        level="ok" if is_enough else "warning",
        found=f"{free / 1e9:.1f} GB at {examined.place}",
        todo=None if is_enough else "a bundle of the official size takes 9 to 16 GB",
    )
    why = why_no_direct_reads(examined.place)
    yield Finding(
        check="O_DIRECT",
        level="ok" if why is None else "warning",
        found="reads go past the page cache" if why is None else why,
        todo=None if why is None else "put bundles on a local disk (ext4, xfs): they page faster",
    )


def memory(examined: Examined) -> Iterator[Finding]:
    text = read_file(examined.root / "proc/meminfo").value or ""
    total = examined.machine.memory_bytes.value
    available = _kib(text, "MemAvailable")
    if total is None or available is None:
        yield unknown("memory", "no MemTotal and MemAvailable in /proc/meminfo")
    else:
        found = f"{available / 1e9:.1f} of {total / 1e9:.1f} GB available"
        left = host.read_memory(examined.root).available_bytes
        if left < available - 64 * _MIB:
            found += f"; a control group leaves {left / 1e9:.1f}"
        yield ok("memory", found)
    swap = _kib(text, "SwapTotal") or 0
    used = swap - (_kib(text, "SwapFree") or 0)
    yield Finding(
        check="swap",
        level="warning" if used > 256 * _MIB else "ok",
        found=f"{used / 1e9:.2f} of {swap / 1e9:.2f} GB used",
        todo="weights that are swapped out stall a step; free memory"
        if used > 256 * _MIB
        else None,
    )


def huge_pages(examined: Examined) -> Iterator[Finding]:
    found = read_file(examined.root / "sys/kernel/mm/transparent_hugepage/enabled").then(
        lambda text: found[1] if (found := re.search(r"\[(\w+)\]", text)) else None, "huge pages"
    )
    if found.value is None:
        yield unknown("huge pages", found.why)
        return
    is_good = found.value in ("always", "madvise")
    yield Finding(
        check="huge pages",
        level="ok" if is_good else "warning",
        found=found.value,
        todo=None
        if is_good
        else "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled: a core reads "
        "twice as fast from huge pages",
    )


def limits(examined: Examined) -> Iterator[Finding]:
    if not examined.is_live:
        return
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    is_enough = soft == resource.RLIM_INFINITY or soft >= _LEAST_MEMLOCK_BYTES
    needs = examined.machine.kind != "cpu"
    yield Finding(
        check="memlock",
        level="ok" if is_enough or not needs else "warning",
        found="unlimited" if soft == resource.RLIM_INFINITY else f"{soft / _MIB:.0f} MiB",
        todo=None if is_enough or not needs else "ulimit -l unlimited: CUDA pins the pool's memory",
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    pids = read_file(examined.root / "sys/fs/cgroup/pids.max").value
    is_few = (soft != resource.RLIM_INFINITY and soft < _LEAST_PROCESSES) or (
        pids is not None and pids.isdigit() and int(pids) < _LEAST_PROCESSES
    )
    yield Finding(
        check="threads",
        level="warning" if is_few else "ok",
        found=f"{'unlimited' if soft == resource.RLIM_INFINITY else soft} processes"
        + (f", {pids} in this control group" if pids else ""),
        todo=host.MORE_THREADS if is_few else None,
    )
    quota = read_file(examined.root / "sys/fs/cgroup/cpu.max").value or "max"
    cores = host.num_cores()
    limit = _quota_cores(quota)
    yield Finding(
        check="cores",
        level="warning" if limit is not None and limit < cores else "ok",
        found=f"{cores}" + (f", a control group allows {limit:.1f}" if limit else ""),
        todo="raise the container's CPU limit, or lower --threads: a thread that is stopped makes "
        "a step late"
        if limit is not None and limit < cores
        else None,
    )


def container(examined: Examined) -> Iterator[Finding]:
    root = examined.root
    is_inside = (root / ".dockerenv").exists() or (root / "run/.containerenv").exists()
    if not is_inside:
        yield ok("container", "none")
        return
    devices = [
        name for name in ("dev/snd", "dev/nvidia0", "dev/nvhost-gpu") if (root / name).exists()
    ]
    yield Finding(
        check="container",
        level="ok" if devices else "warning",
        found=f"inside one; sees {', '.join(devices) or 'no sound card and no GPU'}",
        todo=None if devices else "start it with --device /dev/snd, and --runtime nvidia for a GPU",
    )


def _kib(text: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d{{1,15}}) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _quota_cores(text: str) -> float | None:
    """`100000 50000` of cpu.max: two cores; `max 100000`: no limit."""
    parts = text.split()
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or parts[1] == "0":
        return None
    return int(parts[0]) / int(parts[1])
