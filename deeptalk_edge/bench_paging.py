"""`make bench-paging`: expert paging at full record size, from this machine's disk.

Each contender is a process of its own under the same memory limit; they take turns, one dialogue
turn each, so that a busy disk troubles all of them alike. The routes are synthetic, the bytes and
the waiting are real. What stands in for kernels reads every byte that a kernel would read.

pager      what we ship: direct I/O, phase-aware values, look-ahead, sweep while the user speaks
lru        the same direct I/O and waves; least recently used, and nothing is guessed
mmap       the file mapped, the page cache does the rest
willneed   mapped, and a layer's chosen experts are announced with MADV_WILLNEED
"""

from __future__ import annotations

import argparse
import functools
import json
import mmap
import multiprocessing
import os
import statistics
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.experts.pager import ExpertPager, PagerSettings
from deeptalk_edge.runtime.experts.policy import POLICIES, Phase
from deeptalk_edge.runtime.experts.pool import CpuPool
from deeptalk_edge.runtime.experts.record import ExpertRecord
from deeptalk_edge.runtime.experts.record_file import RecordFile
from deeptalk_edge.runtime.experts.routes import Call, Pass, Routes
from deeptalk_edge.runtime.experts.synthetic import DialogueShape, synthetic_routes

RECORD_BYTES = 4_595_712
"""One int4 expert of DeepSeek-V2-Lite, groups of 64: 1,122 pages."""

DENSE_BYTES = 20_000_000
"""Of a layer outside its routed experts, int4; always resident."""

SLACK_BYTES = 32_000_000
"""What a contender may grow by, besides its experts."""

NUM_EXPERTS, FULL_LAYERS, FIRST_FRAME_STEPS, HANGOVER_S = 64, 26, 8, 0.4

ANSWER_S = 2.0
"""Short, for the sake of the contender that takes seconds per step."""

ENOUGH_S = 60.0
"""Who has taken so long with a pool takes no turn more there, after a cold and a warm one."""

LEAST_TIMES_MMAP, MOST_OVER_LRU, MOST_OVERHEAD_PERCENT = 2.0, 1.03, 1.0
"""The goals: mmap's step over ours at 42 % residency; ours over LRU's; the pager's own time."""

GOAL_PERCENT = 42

Bytes = NDArray[np.uint8]


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(prog="bench_paging", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench_paging"))
    parser.add_argument("--layers", type=int, default=FULL_LAYERS, help="fewer for a quick look")
    parser.add_argument("--turns", type=int, default=3, help="the first is cold")
    parser.add_argument("--preset", default="mid", help="of the routes: flat, mid, local")
    parser.add_argument("--pool", type=int, nargs="+", default=[25, 42, 65, 100], help="percent")
    parser.add_argument("--keep", action="store_true", help="leave the file of experts")
    args = parser.parse_args(argv)
    shape = DialogueShape(num_layers=args.layers, num_turns=args.turns, answer_s=ANSWER_S)
    routes = synthetic_routes(args.preset, shape, seed=1)
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "experts.bin"
    try:
        write_experts(path, args.layers)
        link_gbps = probe(path)
        print(
            f"{args.layers} layers x {NUM_EXPERTS} experts x {RECORD_BYTES / 1e6:.1f} MB; direct "
            f"reads {link_gbps:.2f} GB/s; routes {routes.source}; load average "
            f"{os.getloadavg()[0]:.1f}\n"
        )
        print(HEADER)
        rows = []
        for percent in args.pool:
            rows += measure(path, routes, percent, link_gbps)
        overhead = measure_overhead(path, routes)
        print(*goal_lines(rows, overhead["percent"]), sep="\n")
        print(json.dumps({"link_gbps": link_gbps, "rows": rows, "overhead": overhead}))
    finally:
        if not args.keep:
            path.unlink(missing_ok=True)
    return 0


def write_experts(path: Path, num_layers: int) -> None:
    """Random experts; a file of the right size is used again."""
    size_bytes = num_layers * NUM_EXPERTS * RECORD_BYTES
    if path.exists() and path.stat().st_size == size_bytes:
        return
    layer = np.random.default_rng(0).bytes(NUM_EXPERTS * RECORD_BYTES)
    with path.open("wb") as file:
        for _ in range(num_layers):
            file.write(layer)
            os.fsync(file.fileno())
    forget_cache(path)


def forget_cache(path: Path) -> None:
    """Have no page of the file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def probe(path: Path) -> float:
    """GB/s of direct reads by the pager's own threads into a pool that is too small to help."""
    with open_pager(path, "lru", NUM_EXPERTS) as pager:
        for _ in range(2):  # the first round pays for checksums and for fresh memory
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
    """All contenders at one size of the pool, turn by turn."""
    num_records = path.stat().st_size // RECORD_BYTES
    num_slots = num_records * percent // 100
    results: dict[str, list[dict[str, Any]]] = {}
    # Two that map the file would share its page cache.
    for contenders in (*side_by_side(num_slots * RECORD_BYTES, _available_bytes()), ["willneed"]):
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
    """Who takes turns with whom, so that their pools fit into memory together."""
    count = max(1, int(available_bytes * 0.9) // (pool_bytes + SLACK_BYTES + DENSE_BYTES))
    names = ["pager", "lru", "mmap"]
    return [names[start : start + count] for start in range(0, len(names), count)]


def goal_lines(rows: list[dict[str, Any]], overhead_percent: float) -> Iterator[str]:
    """The goals beside the figures."""
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


def measure_overhead(path: Path, routes: Routes) -> dict[str, float]:
    """The pager's own time in a step with everything resident, beside the step's."""
    num_records = path.stat().st_size // RECORD_BYTES
    experts = _Paged(path, routes, num_records, "pager")
    dense = np.ones(DENSE_BYTES, np.uint8)
    steps = [each for each in routes.passes if each.phase is Phase.SPEAKING][:40]
    for each in steps:
        _run_pass(each, experts, dense)
    asking, whole = [], []
    for each in steps:
        start_s = time.perf_counter()
        _run_pass(each, experts, dense)
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
    """A process for each, in a memory group of its own, with a pipe to it."""
    context = multiprocessing.get_context("fork")
    pipes: dict[str, Connection] = {}
    processes = []
    forget_cache(path)
    groups = {name: _memory_group(f"deeptalk_{os.getpid()}_{name}") for name in names}
    try:
        for name in names:
            pipes[name], far = context.Pipe()
            processes.append(
                context.Process(
                    target=_compete, args=(far, groups[name], path, routes, name, num_slots)
                )
            )
            processes[-1].start()
            far.close()  # else nobody would notice that the process ended
        yield pipes
    finally:
        for pipe in pipes.values():
            with suppress(BrokenPipeError):  # of one that failed; the traceback names it
                pipe.send(None)
        for process in processes:
            process.join()
        for group in groups.values():
            group.rmdir()


def _memory_group(name: str) -> Path:
    """A control group that counts anonymous memory and page cache."""
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


def _available_bytes() -> int:
    """What processes may still take without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


_LIMITS = (
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("memory.max", "memory.current"),
)


def _limit(group: Path, num_bytes: int) -> None:
    """Let a group grow by so much from here on."""
    for limit, usage in _LIMITS:
        if (group / limit).exists():
            used = int((group / usage).read_text())
            (group / limit).write_text(str(used + num_bytes + SLACK_BYTES))


def _compete(
    pipe: Connection, group: Path, path: Path, routes: Routes, name: str, num_slots: int
) -> None:
    """Answer the turns that the pipe names until it says None."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    dense = np.ones(DENSE_BYTES, np.uint8)
    _limit(group, num_slots * RECORD_BYTES)
    experts: _Experts
    if name in ("pager", "lru"):
        experts = _Paged(path, routes, num_slots, name)
    else:
        experts = _Mapped(path, announces=name == "willneed")
    while (turn := pipe.recv()) is not None:
        pipe.send(_run_turn([each for each in routes.passes if each.turn == turn], experts, dense))
    experts.close()


class _Experts(Protocol):
    @property
    def guesses(self) -> bool: ...

    def enter(self, phase: Phase) -> None: ...

    def waves(self, call: Call) -> Iterator[list[Bytes]]: ...

    @property
    def hit_counts(self) -> tuple[int, int] | None: ...

    def close(self) -> None: ...


class _Paged:
    """Experts out of the pager."""

    def __init__(self, path: Path, routes: Routes, num_slots: int, name: str) -> None:
        self.guesses = name == "pager"
        self._pager = open_pager(path, "phased" if self.guesses else "lru", num_slots)
        pool = self._pager.pool
        assert isinstance(pool, CpuPool)
        self._memory, self._last = pool.memory, routes.layers[-1]

    def enter(self, phase: Phase) -> None:
        self._pager.enter(phase)

    def waves(self, call: Call) -> Iterator[list[Bytes]]:
        experts = call.experts
        num_left = len(experts)
        for lease in self._pager.waves(call.layer - 1, experts):
            num_left -= len(lease.slots)
            if self.guesses and not num_left and call.layer < self._last and len(call.predicted):
                self._pager.hint(call.layer, call.hinted)
            yield [self._memory[slot] for slot in lease.slots.values()]

    @property
    def hit_counts(self) -> tuple[int, int] | None:
        residency = self._pager.residency
        return int(residency.hits.sum()), int(residency.misses.sum())

    def close(self) -> None:
        del self._memory
        self._pager.close()


class _Mapped:
    """Experts out of the page cache."""

    guesses = False

    def __init__(self, path: Path, *, announces: bool) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._all = np.frombuffer(self._map, np.uint8).reshape(-1, RECORD_BYTES)
        self._announces = announces

    def enter(self, phase: Phase) -> None:
        pass

    def waves(self, call: Call) -> Iterator[list[Bytes]]:
        keys = [(call.layer - 1) * NUM_EXPERTS + expert for expert in call.experts]
        if self._announces:
            for key in keys:
                self._map.madvise(mmap.MADV_WILLNEED, key * RECORD_BYTES, RECORD_BYTES)
        yield [self._all[key] for key in keys]

    @property
    def hit_counts(self) -> tuple[int, int] | None:
        return None

    def close(self) -> None:
        pass


def open_pager(path: Path, policy: str, num_slots: int) -> ExpertPager:
    """A pager over the bench's file; all records hold layer 0's bytes, and so its checksums."""
    num_records = path.stat().st_size // RECORD_BYTES
    records = [
        ExpertRecord(
            layer=number // NUM_EXPERTS,
            expert=number % NUM_EXPERTS,
            offset=number * RECORD_BYTES,
            bytes=RECORD_BYTES,
            crc32=_checksums(path)[number % NUM_EXPERTS],
        )
        for number in range(num_records)
    ]
    return ExpertPager(
        records,
        RecordFile(path),
        CpuPool(num_slots=num_slots, slot_bytes=RECORD_BYTES),
        POLICIES[policy](num_records, NUM_EXPERTS, None),
        PagerSettings(),
    )


def _run_turn(passes: list[Pass], experts: _Experts, dense: Bytes) -> dict[str, Any]:
    """One turn: the user speaks, in real time; then prefill and decode as fast as they go."""
    before, read_before = experts.hit_counts, _read_bytes()
    turn_start_s = time.perf_counter()
    step_ms, stall_ms = [], []
    first_audio_ms = heard_s = unslept_s = 0.0
    for each in passes:
        if each.phase is Phase.LISTENING:
            experts.enter(each.phase)
            # A stack of fewer layers is swept in less time.
            share = len(passes[1].calls) / FULL_LAYERS
            listened_s = (passes[1].num_rows / 50 + HANGOVER_S) * share
            if experts.guesses:
                time.sleep(listened_s)
            else:  # nothing would happen in that time
                unslept_s = listened_s
            heard_s = time.perf_counter()
            continue
        start_s = time.perf_counter()
        waited_ms = _run_pass(each, experts, dense)
        if each.phase is Phase.SPEAKING:
            step_ms.append((time.perf_counter() - start_s) * 1e3)
            stall_ms.append(waited_ms)
            if len(step_ms) == FIRST_FRAME_STEPS:
                first_audio_ms = (time.perf_counter() - heard_s) * 1e3
    after = experts.hit_counts
    hit_share = None
    if before is not None and after is not None:
        hits, misses = after[0] - before[0], after[1] - before[1]
        hit_share = hits / (hits + misses)
    return {
        "step_ms": step_ms,
        "stall_ms": stall_ms,
        "first_audio_ms": first_audio_ms,
        "hit_share": hit_share,
        "read_bytes": _read_bytes() - read_before,
        "elapsed_s": time.perf_counter() - turn_start_s + unslept_s,
    }


def _run_pass(each: Pass, experts: _Experts, dense: Bytes) -> float:
    """Read what a pass's kernels would read; returns the ms that it waited for experts. A mapped
    file makes the kernels wait, so its waiting shows in the step only."""
    experts.enter(each.phase)
    waited_s = 0.0
    for call in each.calls:
        _touch(dense)
        start_s = time.perf_counter()
        for wave in experts.waves(call):
            waited_s += time.perf_counter() - start_s
            for expert in wave:
                _touch(expert)
            start_s = time.perf_counter()
    return waited_s * 1e3


def _touch(memory: Bytes) -> None:
    np.bitwise_xor.reduce(memory.view(np.uint64))


def _read_bytes() -> int:
    """What this process had read from disk."""
    for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no read_bytes")


@functools.cache
def _checksums(path: Path) -> list[int]:
    """Of the records of a layer."""
    with path.open("rb") as file:
        checksums = [zlib.crc32(file.read(RECORD_BYTES)) for _ in range(NUM_EXPERTS)]
    forget_cache(path)
    return checksums


if __name__ == "__main__":
    sys.exit(main())
