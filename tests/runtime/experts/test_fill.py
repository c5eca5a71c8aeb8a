"""Free slots are filled while the link is idle, and never delay a demand."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.errors import ExpertUnavailable
from deeptalk_edge.runtime.experts.policy import Lru, Phase, Pinned
from deeptalk_edge.runtime.experts.residency import Cause, Residency
from deeptalk_edge.runtime.experts.sizing import MemoryReading
from tests.runtime.experts.records import (
    FIRST_LAYER,
    NUM_EXPERTS,
    NUM_LAYERS,
    NUM_RECORDS,
    SLOT_BYTES,
    assert_right,
    open_pager,
)

ALL = np.arange(NUM_RECORDS)


def test_a_pool_for_all_experts_is_filled_before_the_first_question(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records, fills=True) as pager:
        assert not pager.has_all
        pager.idle()
        pager.drain()
        assert pager.has_all
        for layer in range(FIRST_LAYER, FIRST_LAYER + NUM_LAYERS):
            with pager.acquire(layer, range(NUM_EXPERTS)) as lease:
                assert_right(pager, lease)
        report = pager.report()
        assert (report["misses"], report["loads"]["fill"]) == (0, NUM_RECORDS)
        assert report["moved_bytes"]["fill"] == sum(record.bytes for record in records)


def test_without_fills_a_pager_reads_only_requested_experts(
    path: Path, records: list[ExpertRecord]
) -> None:
    with open_pager(path, records) as pager:
        pager.idle()
        pager.drain()
        assert sum(pager.report()["loads"].values()) == 0


def test_filling_evicts_no_expert(path: Path, records: list[ExpertRecord]) -> None:
    with open_pager(path, records, num_slots=5, fills=True) as pager:
        pager.acquire(4, [6, 7]).release()
        pager.idle()
        pager.drain()
        report = pager.report()
        assert (report["loads"]["fill"], report["evictions"]) == (3, 0)
        pager.acquire(4, [6, 7]).release()
        assert pager.report()["misses"] == 2


def test_a_question_ends_the_filling(path: Path, records: list[ExpertRecord]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def held_up(offset: int, buffer: memoryview) -> None:
        begun.set()
        assert go_on.wait(20)

    with open_pager(path, records, fault=held_up, readers=1, fills=True) as pager:
        pager.idle()
        assert begun.wait(20)
        pager.enter(Phase.THINKING)
        go_on.set()
        pager.drain()
        assert pager.report()["loads"]["fill"] == 1  # the load under way


def test_listening_continues_the_filling(path: Path, records: list[ExpertRecord]) -> None:
    with open_pager(path, records, fills=True) as pager:
        pager.enter(Phase.LISTENING)
        pager.drain()
        assert pager.has_all


def test_a_turn_that_ends_fills_again(path: Path, records: list[ExpertRecord]) -> None:
    with open_pager(path, records, num_slots=NUM_RECORDS, fills=True) as pager:
        pager.enter(Phase.THINKING)
        pager.acquire(1, [0]).release()
        pager.end_turn(MemoryReading(10**9, 0.0), 0.0)
        pager.drain()
        assert pager.has_all


def test_a_damaged_record_is_named_when_it_is_demanded(
    path: Path, records: list[ExpertRecord]
) -> None:
    damaged = NUM_EXPERTS + 3  # layer 2, expert 3
    content = bytearray(path.read_bytes())
    content[damaged * SLOT_BYTES] ^= 1
    path.write_bytes(content)
    with open_pager(path, records, fills=True) as pager:
        pager.idle()
        pager.drain()
        assert pager.report()["failures"] == 1
        pager.acquire(2, [2, 4]).release()
        with pytest.raises(ExpertUnavailable, match="layer 2, expert 3 is damaged"):
            pager.acquire(2, [3])


def test_closing_ends_the_filling(path: Path, records: list[ExpertRecord]) -> None:
    before = set(threading.enumerate())  # other tests' readers, perhaps
    pager = open_pager(path, records, fills=True)
    assert any(thread.name.startswith("expert-reader") for thread in threading.enumerate())
    pager.idle()
    pager.close()
    assert set(threading.enumerate()) <= before


def test_fills_have_the_highest_scores_first_then_layer_order() -> None:
    residency = Residency(
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        num_slots=4,
        policy=Pinned(Lru(NUM_RECORDS), [9, 20]),
    )
    load = residency.fill(0)
    assert load is not None
    assert (load.cause, load.evicted) == (Cause.FILL, None)
    assert residency.plan_fill(ALL) == [9, 20, 1]
    assert residency.fill(0) is None  # it is loaded
    for key in (9, 20, 1):
        residency.fill(key)
    assert residency.fill(2) is None  # there is no free slot
