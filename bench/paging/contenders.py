"""The contenders and the turns that they run: paging is real, a kernel is a read of every byte."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bench.paging.experts_file import NUM_EXPERTS, RECORD_BYTES, checksums
from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.runtime.experts.pager import ExpertPager
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import POLICIES, Phase
from deeptalk_edge.runtime.experts.pool import CpuPool
from deeptalk_edge.runtime.experts.record_file import RecordFile
from deeptalk_edge.runtime.experts.routes import Call, Pass, Routes

FULL_LAYERS, FIRST_FRAME_STEPS, HANGOVER_S = 26, 8, 0.4

Bytes = NDArray[np.uint8]


class Experts(Protocol):
    @property
    def guesses(self) -> bool: ...

    def enter(self, phase: Phase) -> None: ...

    def waves(self, call: Call) -> Iterator[Iterable[Bytes]]: ...

    @property
    def hit_counts(self) -> tuple[int, int] | None: ...

    def close(self) -> None: ...


class Paged:
    """Experts from the pager."""

    def __init__(self, path: Path, routes: Routes, num_slots: int, name: str) -> None:
        self.guesses = name == "pager"
        policy = "phased" if self.guesses else "lru"
        self._pager = open_pager(path, policy, num_slots, PagerSettings(fills=self.guesses))
        pool = self._pager.pool
        assert isinstance(pool, CpuPool)
        self._memory, self._last = pool.memory, routes.layers[-1]

    def enter(self, phase: Phase) -> None:
        self._pager.enter(phase)

    def waves(self, call: Call) -> Iterator[Iterable[Bytes]]:
        experts = call.experts
        num_left = len(experts)
        guesses = self.guesses and call.layer < self._last and not self._pager.has_all
        for lease in self._pager.waves(call.layer - 1, experts):
            num_left -= len(lease.slots)
            if guesses and not num_left and len(call.predicted):
                self._pager.hint(call.layer, call.hinted)
            yield (self._memory[slot] for slot in lease.slots.values())

    def load_all(self) -> None:
        """Load every expert, if the pool has room."""
        for layer in range(self._last):
            for _ in self._pager.waves(layer, range(NUM_EXPERTS)):
                pass

    @property
    def hit_counts(self) -> tuple[int, int] | None:
        residency = self._pager.residency
        return int(residency.hits.sum()), int(residency.misses.sum())

    def close(self) -> None:
        del self._memory
        self._pager.close()


class Mapped:
    """Experts from the page cache."""

    guesses = False

    def __init__(self, path: Path, *, announces: bool) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._all = np.frombuffer(self._map, np.uint8).reshape(-1, RECORD_BYTES)
        self._announces = announces

    def enter(self, phase: Phase) -> None:
        pass

    def waves(self, call: Call) -> Iterator[Iterable[Bytes]]:
        keys = [(call.layer - 1) * NUM_EXPERTS + expert for expert in call.experts]
        if self._announces:
            for key in keys:
                self._map.madvise(mmap.MADV_WILLNEED, key * RECORD_BYTES, RECORD_BYTES)
        yield (self._all[key] for key in keys)

    @property
    def hit_counts(self) -> tuple[int, int] | None:
        return None

    def close(self) -> None:
        pass


def open_pager(
    path: Path, policy: str, num_slots: int, settings: PagerSettings | None = None
) -> ExpertPager:
    """Open a pager on the bench's file; all layers have the bytes and checksums of layer 0."""
    num_records = path.stat().st_size // RECORD_BYTES
    records = [
        ExpertRecord(
            layer=number // NUM_EXPERTS,
            expert=number % NUM_EXPERTS,
            offset=number * RECORD_BYTES,
            bytes=RECORD_BYTES,
            crc32=checksums(path)[number % NUM_EXPERTS],
        )
        for number in range(num_records)
    ]
    return ExpertPager(
        records,
        RecordFile(path),
        CpuPool(num_slots=num_slots, slot_bytes=RECORD_BYTES),
        POLICIES[policy](num_records, NUM_EXPERTS, None),
        settings,
    )


def run_turn(passes: list[Pass], experts: Experts, dense: Bytes) -> dict[str, Any]:
    """Run one turn: the user speaks in real time; then prefill and decode run at full speed."""
    before, read_before = experts.hit_counts, _read_bytes()
    turn_start_s = time.perf_counter()
    step_ms, stall_ms = [], []
    first_audio_ms = heard_s = unslept_s = 0.0
    for each in passes:
        if each.phase is Phase.LISTENING:
            experts.enter(each.phase)
            # A model with fewer layers needs less time for its sweep.
            share = len(passes[1].calls) / FULL_LAYERS
            listened_s = (passes[1].num_rows / 50 + HANGOVER_S) * share
            if experts.guesses:
                time.sleep(listened_s)
            else:  # nothing is read in that time
                unslept_s = listened_s
            heard_s = time.perf_counter()
            continue
        start_s = time.perf_counter()
        waited_ms = run_pass(each, experts, dense)
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


def run_pass(each: Pass, experts: Experts, dense: Bytes) -> float:
    """Read what a pass's kernels would read; returns the ms of waiting for experts. With a mapped
    file the kernels wait, so that time is only in the step."""
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
    """Bytes that this process has read from disk."""
    for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no read_bytes")
