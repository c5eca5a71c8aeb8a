"""`bench paging`: the groups of contenders and the goals; the rest needs root and a disk."""

from __future__ import annotations

import pytest

from deeptalk_edge.bench.paging.goals import goal_lines
from deeptalk_edge.bench.paging.main import side_by_side

GB = 10**9


@pytest.mark.parametrize(
    ("pool_gb", "groups"),
    [
        (3, [["pager", "lru", "mmap"]]),
        (5, [["pager", "lru"], ["mmap"]]),
        (8, [["pager"], ["lru"], ["mmap"]]),
        (90, [["pager"], ["lru"], ["mmap"]]),
    ],
)
def test_contenders_run_together_as_far_as_memory_allows(
    pool_gb: int, groups: list[list[str]]
) -> None:
    assert side_by_side(pool_gb * GB, 16 * GB) == groups


def rows(percent: int, **step_ms: float) -> list[dict[str, object]]:
    return [{"pool_percent": percent, "contender": c, "step_ms": ms} for c, ms in step_ms.items()]


def test_goals_are_judged_for_each_pool() -> None:
    found = rows(42, pager=50.0, lru=48.0, mmap=100.0) + rows(65, pager=40.0, lru=39.0, mmap=41.0)
    verdicts = [text.split()[-1] for text in goal_lines(found, 1.01)][1:]
    assert verdicts == ["met", "missed", "met", "missed"]
