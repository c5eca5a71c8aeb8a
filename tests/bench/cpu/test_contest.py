"""Contenders run in separate processes; here they are objects of the standard library."""

from __future__ import annotations

import importlib
import operator
import os
import time
from collections import deque
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path

import pytest

from deeptalk_edge.bench.cpu.contest import Contender, Work, take_turns
from deeptalk_edge.errors import BackendError


def test_contenders_take_turns_call_by_call(tmp_path: Path) -> None:
    place, log = tmp_path / "turns", tmp_path / "log"
    opens = partial(open, place, "a", 1)
    with (
        closing(Contender("left", opens, log)) as left,
        closing(Contender("right", opens, log)) as right,
    ):
        works = {
            "l": Work(contender=left, timed=("write", "l\n"), before=(("write", "b\n"),)),
            "r": Work(contender=right, timed=("write", "r\n")),
        }
        timings = take_turns(works, 2)
    assert place.read_text().split() == ["b", "l", "r"] * 3
    assert set(timings) == {"l", "r"}


@pytest.mark.parametrize(("warm_up", "counts"), [(0, True), (1, False)])
def test_the_first_round_counts_without_a_warm_up_only(
    warm_up: int, counts: bool, tmp_path: Path
) -> None:
    with closing(
        Contender("slow once", partial(lru_cache, time.sleep), tmp_path / "log")
    ) as slow_once:
        work = Work(contender=slow_once, timed=("__call__", 0.5))
        timing = take_turns({"only": work}, 1, warm_up=warm_up)["only"]
    assert (timing.wall_s > 0.2) is counts
    assert timing.cpu_s < 0.1  # sleeping uses no processor time


def test_a_failure_in_the_process_is_raised_here_with_its_traceback(tmp_path: Path) -> None:
    with (
        closing(Contender("empty", deque, tmp_path / "log")) as empty,
        pytest.raises(BackendError, match=r"(?s)empty failed.*IndexError: pop from an empty"),
    ):
        empty.call(("pop",))


def test_a_process_that_dies_is_named_and_its_output_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(BackendError, match=rf"mayfly: its process ended with -15 .*{log}"):
        Contender("mayfly", partial(os.system, "echo last words; kill $PPID"), log)
    assert log.read_text() == "last words\n"


def test_memory_is_that_of_the_contender_s_own_process(tmp_path: Path) -> None:
    with closing(
        Contender("large", partial(operator.mul, b"x", 64 << 20), tmp_path / "log")
    ) as large:
        memory = large.memory()
    with closing(
        Contender("small", partial(importlib.import_module, "time"), tmp_path / "log")
    ) as small:
        assert small.memory().resident_bytes < memory.resident_bytes - (32 << 20)
    assert 0 <= memory.huge_share <= 1
