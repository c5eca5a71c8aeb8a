"""Measures expert paging at full record size, from this machine's disk.

Each contender is a separate process with the same memory limit. They run one dialogue turn each in
turn, so that a busy disk affects all of them. The routes are synthetic, the bytes and the waits are
real. Instead of a kernel, code reads every byte that a kernel would read.

pager      our product: direct I/O, phase-aware scores and look-ahead; while the user speaks, a
           sweep and fills of free slots. Between turns it does nothing, because the others run then
lru        the same direct I/O and waves, least recently used, without guesses
mmap       the mapped file; the page cache decides
willneed   the mapped file, with MADV_WILLNEED for a layer's chosen experts
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.bench.harness import arguments, measured
from deeptalk_edge.bench.paging.contenders import (
    FULL_LAYERS,
    Experts,
    Mapped,
    Paged,
    open_pager,
    run_pass,
    run_turn,
)
from deeptalk_edge.bench.paging.experts_file import (
    NUM_EXPERTS,
    RECORD_BYTES,
    forget_cache,
    write_experts,
)
from deeptalk_edge.bench.paging.goals import goal_lines
from deeptalk_edge.bench.paging.memory_group import (
    SLACK_BYTES,
    limit_growth,
    memory_group,
)
from deeptalk_edge.devices.replay.synthetic import DialogueShape, synthetic_routes
from deeptalk_edge.files import scratch_directory
from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.runtime.experts.routes import Routes
from deeptalk_edge.runtime.experts.sizing import read_memory

DENSE_BYTES = 20_000_000
"""Bytes of a layer outside its routed experts, in int4; always resident."""

ANSWER_S = 2.0
"""Few steps, because the slowest contender takes seconds per step."""

ENOUGH_S = 60.0
"""A contender that has taken so long with a pool stops after one cold and one warm turn."""


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and a line of JSON."""
    parser = arguments("paging", __doc__)
    parser.add_argument("--work", type=Path, default=Path("build/paging"))
    parser.add_argument("--layers", type=int, default=FULL_LAYERS, help="fewer for a quick look")
    parser.add_argument("--turns", type=int, default=3, help="the first is cold")
    parser.add_argument("--preset", default="mid", help="locality of the routes: flat, mid, local")
    parser.add_argument("--pool", type=int, nargs="+", default=[25, 42, 65, 100], help="percent")
    parser.add_argument("--keep", action="store_true", help="keep the file of experts")
    args = parser.parse_args(argv)
    with measured(args) as figures:
        shape = DialogueShape(num_layers=args.layers, num_turns=args.turns, answer_s=ANSWER_S)
        routes = synthetic_routes(args.preset, shape, seed=1)
        path = args.work / "experts.bin"
        with scratch_directory(args.work, keep=args.keep):
            write_experts(path, args.layers)
            link_gbps = probe(path)
            print(
                f"{args.layers} layers x {NUM_EXPERTS} experts x {RECORD_BYTES / 1e6:.1f} MB; "
                f"direct reads {link_gbps:.2f} GB/s; routes {routes.source}\n"
            )
            print(HEADER)
            rows = []
            for percent in args.pool:
                rows += measure(path, routes, percent, link_gbps)
            overhead = measure_overhead(path, routes)
            print(*goal_lines(rows, overhead["percent"]), sep="\n")
            figures.update({"link_gbps": link_gbps, "rows": rows, "overhead": overhead})
    return 0


def probe(path: Path) -> float:
    """GB/s of direct reads by the pager's threads into a pool that is too small to help."""
    with open_pager(path, "lru", NUM_EXPERTS) as pager:
        for _ in range(2):  # the first round includes checksums and new memory
            start_s = time.perf_counter()
            for layer in range(2):
                for _ in pager.waves(layer, range(NUM_EXPERTS)):
                    pass
        return 2 * NUM_EXPERTS * RECORD_BYTES / (time.perf_counter() - start_s) / 1e9


HEADER = (
    f"{'pool':>5} {'contender':10}{'step ms':>9}{'p95':>8}{'first audio ms':>16}{'cold':>8}"
    f"{'hits':>7}{'stall ms':>10}{'GB read':>9}{'link use':>10}"
)


def measure(path: Path, routes: Routes, percent: int, link_gbps: float) -> list[dict[str, Any]]:
    """Measure all contenders at one size of the pool, turn by turn."""
    num_records = path.stat().st_size // RECORD_BYTES
    num_slots = num_records * percent // 100
    results: dict[str, list[dict[str, Any]]] = {}
    together = side_by_side(num_slots * RECORD_BYTES, read_memory().available_bytes)
    for contenders in (*together, ["willneed"]):  # two mapped ones share the page cache
        results |= {name: [] for name in contenders}
        spent_s = dict.fromkeys(contenders, 0.0)
        with _contestants(path, routes, contenders, num_slots) as pipes:
            for turn in range(1, 1 + max(each.turn for each in routes.passes)):
                for name in contenders:
                    if turn > 2 and spent_s[name] > ENOUGH_S:
                        continue
                    pipes[name].send(turn)
                    results[name].append(pipes[name].recv())
                    spent_s[name] += results[name][-1]["elapsed_s"]
    rows = []
    for name, turns in results.items():
        warm = turns[1:] or turns
        steps = [ms for turn in warm for ms in turn["step_ms"]]
        elapsed_s = sum(turn["elapsed_s"] for turn in warm)
        read_bytes = sum(turn["read_bytes"] for turn in warm)
        hits = [turn["hit_share"] for turn in warm if turn["hit_share"] is not None]
        row = {
            "pool_percent": percent,
            "contender": name,
            "step_ms": statistics.median(steps),
            "step_ms_mean": statistics.fmean(steps),
            "step_ms_p95": float(np.percentile(steps, 95)),
            "first_audio_ms": statistics.median(turn["first_audio_ms"] for turn in warm),
            "cold_first_audio_ms": turns[0]["first_audio_ms"],
            "hit_share": statistics.fmean(hits) if hits else None,
            "stall_ms_per_step": statistics.fmean(ms for turn in warm for ms in turn["stall_ms"]),
            "read_gb": read_bytes / 1e9,
            "link_use": read_bytes / 1e9 / elapsed_s / link_gbps,
        }
        rows.append(row)
        hit = "-" if row["hit_share"] is None else f"{row['hit_share']:.1%}"
        print(
            f"{percent:>4}% {name:10}{row['step_ms']:9.1f}{row['step_ms_p95']:8.1f}"
            f"{row['first_audio_ms']:16.0f}{row['cold_first_audio_ms']:8.0f}{hit:>7}"
            f"{row['stall_ms_per_step']:10.1f}{row['read_gb']:9.1f}{row['link_use']:10.0%}",
            flush=True,
        )
    return rows


def side_by_side(pool_bytes: int, available_bytes: int) -> list[list[str]]:
    """Group the contenders so that the pools of a group fit into memory together."""
    count = max(1, int(available_bytes * 0.9) // (pool_bytes + SLACK_BYTES + DENSE_BYTES))
    names = ["pager", "lru", "mmap"]
    return [names[start : start + count] for start in range(0, len(names), count)]


def measure_overhead(path: Path, routes: Routes) -> dict[str, float]:
    """Measure the pager's time in a step with every expert resident, and the step's time."""
    num_records = path.stat().st_size // RECORD_BYTES
    experts = Paged(path, routes, num_records, "pager")
    dense = np.ones(DENSE_BYTES, np.uint8)
    steps = [each for each in routes.passes if each.phase is Phase.SPEAKING][:40]
    experts.load_all()
    for each in steps:
        run_pass(each, experts, dense)
    asking, whole = [], []
    for each in steps:
        start_s = time.perf_counter()
        run_pass(each, experts, dense)
        whole.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        experts.enter(each.phase)
        for call in each.calls:
            for _ in experts.waves(call):
                pass
        asking.append(time.perf_counter() - start_s)
    experts.close()
    asked_ms, step_ms = statistics.median(asking) * 1e3, statistics.median(whole) * 1e3
    return {"pager_ms": asked_ms, "step_ms": step_ms, "percent": 100 * asked_ms / step_ms}


@contextmanager
def _contestants(
    path: Path, routes: Routes, names: list[str], num_slots: int
) -> Iterator[dict[str, Connection]]:
    """Start a process for each contender, in a new memory group, with a pipe to it."""
    context = multiprocessing.get_context("fork")
    pipes: dict[str, Connection] = {}
    processes = []
    forget_cache(path)
    groups = {name: memory_group(f"deeptalk_{os.getpid()}_{name}") for name in names}
    try:
        for name in names:
            pipes[name], far = context.Pipe()
            processes.append(
                context.Process(
                    target=_compete, args=(far, groups[name], path, routes, name, num_slots)
                )
            )
            processes[-1].start()
            far.close()  # otherwise the end of the process would go unnoticed
        yield pipes
    finally:
        for pipe in pipes.values():
            with suppress(BrokenPipeError):  # the contender failed; the traceback names it
                pipe.send(None)
        for process in processes:
            process.join()
        for group in groups.values():
            group.rmdir()


def _compete(
    pipe: Connection, group: Path, path: Path, routes: Routes, name: str, num_slots: int
) -> None:
    """Run the turns from the pipe until it sends None."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    dense = np.ones(DENSE_BYTES, np.uint8)
    limit_growth(group, num_slots * RECORD_BYTES)
    experts: Experts
    if name in ("pager", "lru"):
        experts = Paged(path, routes, num_slots, name)
    else:
        experts = Mapped(path, announces=name == "willneed")
    while (turn := pipe.recv()) is not None:
        pipe.send(run_turn([each for each in routes.passes if each.turn == turn], experts, dense))
    experts.close()
