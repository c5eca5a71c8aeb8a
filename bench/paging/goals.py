"""The goals of the paging bench, compared with its figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

LEAST_TIMES_MMAP, MOST_OVER_LRU, MOST_OVERHEAD_PERCENT = 2.0, 1.03, 1.0
"""The goals: mmap's step over ours at 42 % residency; ours over LRU's; the pager's own time."""

GOAL_PERCENT = 42


def goal_lines(rows: list[dict[str, Any]], overhead_percent: float) -> Iterator[str]:
    """Format each goal with its figure."""
    step_ms = {(row["pool_percent"], row["contender"]): row["step_ms"] for row in rows}
    yield "\ngoals"
    for (percent, name), ours_ms in step_ms.items():
        if name != "pager":
            continue
        if percent == GOAL_PERCENT:
            times = step_ms[percent, "mmap"] / ours_ms
            yield _goal(
                f"mmap's step / ours, pool {percent} %", times, LEAST_TIMES_MMAP, least=True
            )
        over = ours_ms / step_ms[percent, "lru"]
        yield _goal(f"our step / plain LRU's, pool {percent} %", over, MOST_OVER_LRU)
    what = "all resident, % of a step that goes to the pager"
    yield _goal(what, overhead_percent, MOST_OVERHEAD_PERCENT)


def _goal(what: str, figure: float, bound: float, *, least: bool = False) -> str:
    is_met = figure >= bound if least else figure <= bound
    sense = "at least" if least else "at most"
    return f"  {what:52}{figure:7.2f}  {sense} {bound:.2f}: {'met' if is_met else 'missed'}"
