"""The report's table and goals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deeptalk_edge.bench.cpu.report import HEADER, Frame, Row, goal_table, line

STEP = Row(
    decoder="27x16",
    what="step",
    num_rows=256,
    threads=1,
    by="native",
    wall_ms=50.0,
    cpu_ms=49.0,
    gb_s=28.0,
    probe_share=0.9,
    gflop_s=None,
    times_native=1.0,
    huge_share=0.99,
    resident_gb=2.9,
)

FRAME = Frame(
    decoder="5x64",
    num_rows=256,
    threads=1,
    dense_layer_ms=2.0,
    moe_layer_ms=1.5,
    num_moe_layers=26,
    heads_ms=5.0,
    sampling_ms=0.5,
    codec_ms=13.0,
)


def verdict(goal: str, *rows: Row, frames: tuple[Frame, ...] = ()) -> str:
    """The cells of the goal whose text begins with `goal`."""
    (found,) = (text for text in goal_table(rows, frames) if text.startswith(f"| {goal}"))
    return found.partition(" | ")[2]


def test_a_row_has_a_cell_for_every_column() -> None:
    assert line(STEP).count("|") == HEADER.splitlines()[0].count("|")


def test_a_frame_is_the_sum_of_its_parts() -> None:
    assert FRAME.sum_ms == pytest.approx(2.0 + 26 * 1.5 + 5.0 + 0.5 + 13.0)


@pytest.mark.parametrize(("times", "says"), [(1.5, "1.50 | met |"), (1.49, "1.49 | missed |")])
def test_a_goal_is_judged_by_its_worst_context(times: float, says: str) -> None:
    better = replace(STEP, by="llama.cpp", decoder="5x64", times_native=1.9)
    worst = replace(better, decoder="27x16", times_native=times)
    assert verdict("step after 256, times llama.cpp", better, worst) == says


def test_other_contexts_threads_and_peers_do_not_count_for_a_goal() -> None:
    rows = [
        replace(STEP, by="llama.cpp", num_rows=1024, times_native=1.1),
        replace(STEP, by="llama.cpp", threads=2, times_native=1.1),
        replace(STEP, by="ik_llama.cpp", times_native=1.1),
    ]
    assert verdict("step after 256, times llama.cpp", *rows) == "| not measured |"


def test_long_contexts_have_a_separate_goal() -> None:
    rows = [
        replace(STEP, by="llama.cpp", num_rows=num_rows, times_native=times)
        for num_rows, times in ((1024, 1.7), (2048, 2.1), (4096, 2.5))
    ]
    assert verdict("step after 2048", *rows) == "2.10 | met |"


def test_two_threads_are_compared_with_one_by_wall_time_in_the_same_context() -> None:
    rows = [
        STEP,
        replace(STEP, threads=2, wall_ms=28.0, cpu_ms=56.0),
        replace(STEP, num_rows=4096, wall_ms=60.0),
    ]
    assert verdict("step, two threads", *rows) == f"{50 / 28:.2f} | met |"


def test_a_frame_must_be_ready_in_its_own_length_on_one_core() -> None:
    assert verdict("one frame, 1 thread", frames=(FRAME,)) == "59.5 | met |"
    late = replace(FRAME, moe_layer_ms=2.5)
    assert verdict("one frame, 1 thread", frames=(FRAME, late)) == "85.5 | missed |"
    assert verdict("one frame, 2 thread", frames=(FRAME,)) == "| not measured |"
