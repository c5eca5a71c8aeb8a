"""A file of experts for tests, and faults of its reads."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.runtime.experts.lease import Lease
from deeptalk_edge.runtime.experts.pager import ExpertPager
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import POLICIES, Phase, Policy
from deeptalk_edge.runtime.experts.pool import CpuPool
from deeptalk_edge.runtime.experts.record_file import PAGE_BYTES, RecordFile
from deeptalk_edge.runtime.experts.sizing import SHORT_S, MemoryReading

FIRST_LAYER = 1
NUM_LAYERS, NUM_EXPERTS = 4, 8
NUM_RECORDS = NUM_LAYERS * NUM_EXPERTS
RECORD_BYTES = 2 * PAGE_BYTES + 100  # three chunks of a page; the last one ends with padding
SLOT_BYTES = 3 * PAGE_BYTES
LAYERS = range(FIRST_LAYER, FIRST_LAYER + NUM_LAYERS)


def write_records(path: Path) -> list[ExpertRecord]:
    """Every record repeats its number."""
    records, content = [], bytearray()
    for number in range(NUM_RECORDS):
        body = content_of(number)
        records.append(
            ExpertRecord(
                layer=FIRST_LAYER + number // NUM_EXPERTS,
                expert=number % NUM_EXPERTS,
                offset=len(content),
                bytes=RECORD_BYTES,
                crc32=zlib.crc32(body),
            )
        )
        content += body.ljust(SLOT_BYTES, b"\0")
    path.write_bytes(content)
    return records


def content_of(number: int) -> bytes:
    return bytes([number + 1]) * RECORD_BYTES


def open_pager(
    path: Path,
    records: list[ExpertRecord],
    *,
    num_slots: int = NUM_RECORDS,
    policy: Policy | str = "lru",
    fault: Fault | None = None,
    **settings: object,
) -> ExpertPager:
    if isinstance(policy, str):
        policy = POLICIES[policy](NUM_RECORDS, NUM_EXPERTS, None)
    file = RecordFile(path)
    return ExpertPager(
        records,
        file if fault is None else FaultyFile(file, fault),
        CpuPool(num_slots=num_slots, slot_bytes=SLOT_BYTES),
        policy,
        PagerSettings(**{"chunk_bytes": PAGE_BYTES, **settings}),  # type: ignore[arg-type]
    )


Fault = Callable[[int, memoryview], "int | None"]
"""A function of (offset, buffer) that raises, damages, or limits a read; None leaves it
unchanged."""


def harmless(offset: int, buffer: memoryview) -> None:
    """No fault at all."""


@dataclass
class FaultyFile:
    """A real file with a fault in its reads."""

    file: RecordFile
    fault: Fault
    damages: Callable[[int], bool] = lambda offset: False
    """Whether the read at this offset gets a wrong bit."""
    num_reads: int = field(default=0)

    @property
    def name(self) -> str:
        return self.file.name

    @property
    def size_bytes(self) -> int:
        return self.file.size_bytes

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self.num_reads += 1
        limit = self.fault(offset, buffer)
        got = self.file.read_into(offset, buffer)
        if self.damages(offset):
            buffer[0] ^= 1
        return got if limit is None else min(got, limit)

    def close(self) -> None:
        self.file.close()


class Gate:
    """Holds up every read of the guessed records until it is opened."""

    def __init__(self, *numbers: int) -> None:
        self.numbers, self.opened = numbers, threading.Event()
        self.held = threading.Event()

    def __call__(self, offset: int, buffer: memoryview) -> None:
        if offset // SLOT_BYTES in self.numbers:
            self.held.set()
            assert self.opened.wait(20)


def leased_bytes(pager: ExpertPager, slot: int) -> bytes:
    pool = pager.pool
    assert isinstance(pool, CpuPool)
    return pool.memory[slot, :RECORD_BYTES].tobytes()


def sleepy(seconds: float, seed: int = 0) -> Fault:
    """Reads take random times, so that every run has another order."""
    random = np.random.default_rng(seed)

    def fault(offset: int, buffer: memoryview) -> None:
        time.sleep(float(random.random()) * seconds)

    return fault


def number_of(layer: int, expert: int) -> int:
    """The record of an expert."""
    return (layer - FIRST_LAYER) * NUM_EXPERTS + expert


def assert_right(pager: ExpertPager, lease: Lease) -> None:
    """Check that the leased slots have the file's bytes at the lease's addresses."""
    for expert, slot in lease.slots.items():
        assert leased_bytes(pager, slot) == content_of(number_of(lease.layer, expert))
        assert lease.addresses[expert] == lease.address(expert) == pager.pool.address(slot)


def walk(pager: ExpertPager, *, num_steps: int, seed: int, num_chosen: int = 2) -> None:
    """Random routes, right and wrong hints, and phases, with a check of every byte."""
    random = Random(seed)
    phases = (Phase.SPEAKING, Phase.SPEAKING, Phase.SPEAKING, Phase.THINKING, Phase.LISTENING)
    for _ in range(num_steps):
        phase = random.choice(phases)
        pager.enter(phase)
        if phase is Phase.LISTENING:
            continue
        for layer in LAYERS:
            count = num_chosen if phase is Phase.SPEAKING else NUM_EXPERTS - 1
            for lease in pager.waves(layer, random.sample(range(NUM_EXPERTS), count)):
                if layer + 1 in LAYERS:
                    pager.hint(layer + 1, random.sample(range(NUM_EXPERTS), 2))
                assert_right(pager, lease)


def shrink(pager: ExpertPager, now_s: float) -> int:
    """End two turns, half a minute apart, while memory is short; returns the slots given back."""
    little = MemoryReading(10**8, 0.0)
    turns = [pager.end_turn(little, now_s + later_s) for later_s in (0.0, SHORT_S)]
    return sum(turn["slots_given_back"] for turn in turns)
