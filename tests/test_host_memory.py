"""The available memory of the machine and of every control group that bounds this process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.host import read_memory

GB = 1_000_000_000
V1_UNLIMITED = "9223372036854771712"


def machine(root: Path, **files: str | int) -> Path:
    """A /proc and control groups with 20 GB available."""
    for name, content in {"proc/meminfo": f"MemAvailable: {20 * GB // 1024} kB\n", **files}.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{content}\n")
    return root


def group(place: str, limit: object, used: int, **stat: int) -> dict[str, str | int]:
    """A group of version 2, or of version 1 below `memory/`."""
    is_v1 = place.startswith("sys/fs/cgroup/memory")
    names = ("limit_in_bytes", "usage_in_bytes") if is_v1 else ("max", "current")
    lines = "\n".join(f"{name} {count}" for name, count in {"anon": 7, **stat}.items())
    limits = {
        f"{place}/memory.{name}": str(v) for name, v in zip(names, (limit, used), strict=True)
    }
    return {**limits, f"{place}/memory.stat": lines}


ROOT, V1_ROOT = "sys/fs/cgroup", "sys/fs/cgroup/memory"
UNIFIED = "35 31 0:41 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
MEMORY = "32 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"

CASES = {
    "no group": ({}, 20.0),
    "a container that sees its own group alone": (group(ROOT, 3 * GB, GB), 2.0),
    "no limit": (group(ROOT, "max", GB), 20.0),
    "systemd's MemoryMax of the service": (
        {
            "proc/self/cgroup": "0::/system.slice/kiosk.service",
            **group(f"{ROOT}/system.slice", "max", GB),
            **group(f"{ROOT}/system.slice/kiosk.service", 2 * GB, GB // 2),
        },
        1.5,
    ),
    "the slice above the service is tighter": (
        {
            "proc/self/cgroup": "0::/kiosks.slice/one.service",
            **group(f"{ROOT}/kiosks.slice", 3 * GB, 2 * GB),
            **group(f"{ROOT}/kiosks.slice/one.service", 5 * GB, GB),
        },
        1.0,
    ),
    "systemd's MemoryHigh": (
        {
            "proc/self/cgroup": "0::/a",
            **group(f"{ROOT}/a", "max", GB),
            f"{ROOT}/a/memory.high": 2 * GB,
        },
        1.0,
    ),
    "version 1, the host's groups are visible": (
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpuset:/",
            **group(V1_ROOT, V1_UNLIMITED, GB),
            **group(f"{V1_ROOT}/docker/abc", 2 * GB, GB // 2),
        },
        1.5,
    ),
    "version 1, a group below the container's own": (
        {
            "proc/self/cgroup": "5:cpu,memory:/docker/abc/inner\n0::/",
            "proc/self/mountinfo": f"{UNIFIED}\n{MEMORY.format(top='/docker/abc')}",
            **group(V1_ROOT, 8 * GB, GB),
            **group(f"{V1_ROOT}/inner", 4 * GB, GB),
        },
        3.0,
    ),
    "a group out of the container's sight": (
        {"proc/self/cgroup": "0::/../other", **group(ROOT, 3 * GB, GB)},
        2.0,
    ),
    "version 2, page cache can go": (
        group(ROOT, 4 * GB, 4 * GB, active_file=GB, inactive_file=GB, slab_reclaimable=GB // 2),
        2.5,
    ),
    "version 1, page cache of the children can go": (
        group(V1_ROOT, 4 * GB, 4 * GB, active_file=1, total_active_file=GB, total_inactive_file=GB),
        2.0,
    ),
    "the limit that slows a group down is below the one that kills": (
        {**group(ROOT, 4 * GB, GB), f"{ROOT}/memory.high": 3 * GB},
        2.0,
    ),
    "over its limit": (group(ROOT, GB, 2 * GB), 0.0),
}


@pytest.mark.parametrize(("files", "left_gb"), CASES.values(), ids=CASES)
def test_the_tightest_group_counts(
    files: dict[str, str | int], left_gb: float, tmp_path: Path
) -> None:
    assert read_memory(machine(tmp_path, **files)).available_bytes / GB == pytest.approx(left_gb)


def test_the_share_of_waiting_tasks_is_of_the_last_minute(tmp_path: Path) -> None:
    pressure = "some avg10=90.00 avg60=7.50 avg300=0.00 total=1\nfull avg10=1.00 avg60=2.00"
    assert read_memory(machine(tmp_path)).stalled_percent is None
    known = machine(tmp_path, **{"proc/pressure/memory": pressure})
    assert read_memory(known).stalled_percent == 7.5


def test_a_system_without_memory_figures_is_refused(tmp_path: Path) -> None:
    machine(tmp_path, **{"proc/meminfo": "MemTotal: 5 kB"})
    with pytest.raises(DoesNotFit, match="no MemAvailable"):
        read_memory(tmp_path)


# A child that joins the group, fills its page cache, and reads the available memory.
_MEMBER = """
import os, sys
from deeptalk_edge.host import read_memory
with open(sys.argv[1] + "/cgroup.procs", "w") as group:
    group.write(str(os.getpid()))
with open(sys.argv[2], "wb") as file:
    for _ in range(100):
        file.write(bytes(1_000_000))
    os.fsync(file.fileno())
print(read_memory().available_bytes)
"""


@contextlib.contextmanager
def _own_group(limit_bytes: int) -> Iterator[Path]:
    """A real control group below this process's; skips the test if none can be made."""
    for root, name in ((V1_ROOT, "memory.limit_in_bytes"), (ROOT, "memory.max")):
        place = Path("/", root, "deeptalk-test")
        try:
            place.mkdir()
            (place / name).write_text(str(limit_bytes))
        except OSError:
            with contextlib.suppress(OSError):
                place.rmdir()
            continue
        try:
            yield place
        finally:
            place.rmdir()
        return
    pytest.skip("no control group can be made here (root, cgroup v1 or v2): none was read")


def test_a_real_control_group_bounds_the_available_memory(tmp_path: Path) -> None:
    limit_bytes = 400_000_000
    with _own_group(limit_bytes) as place:
        done = subprocess.run(
            [sys.executable, "-c", _MEMBER, str(place), str(tmp_path / "written")],
            capture_output=True,
            text=True,
            check=True,
        )
    # The interpreter and numpy's absence: some 20 MB; the 100 MB that were written can go.
    assert limit_bytes - 90_000_000 < int(done.stdout) < limit_bytes
    assert read_memory().available_bytes > limit_bytes
