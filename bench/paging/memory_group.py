"""Limits on memory that count the page cache: control groups, version 1 or 2."""

from __future__ import annotations

from pathlib import Path

SLACK_BYTES = 32_000_000
"""Memory of a contender besides its experts."""


def memory_group(name: str) -> Path:
    """Make a control group that counts anonymous memory and page cache."""
    root = Path("/sys/fs/cgroup")
    for parent in (root / "memory", root):
        group = parent / name
        try:
            group.mkdir()
        except OSError:
            continue
        if any((group / limit).exists() for limit, _ in _LIMITS):
            return group
        group.rmdir()
    raise SystemExit(
        "bench_paging: no control group can be made for memory, and nothing else bounds the page "
        "cache; run as root on a machine with cgroup v1 or v2"
    )


_LIMITS = (
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("memory.max", "memory.current"),
)


def limit_growth(group: Path, num_bytes: int) -> None:
    """Limit a group to its present memory and `num_bytes` more."""
    for limit, usage in _LIMITS:
        if (group / limit).exists():
            used = int((group / usage).read_text())
            (group / limit).write_text(str(used + num_bytes + SLACK_BYTES))
