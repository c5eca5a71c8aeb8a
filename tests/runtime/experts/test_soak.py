"""A pager that runs for hours uses no more memory than in its first minute."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest

from deeptalk_edge.runtime.experts.policy import Phase
from tests.runtime.experts.records import (
    FIRST_LAYER,
    NUM_EXPERTS,
    NUM_LAYERS,
    content_of,
    leased_bytes,
    open_pager,
    write_records,
)


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


TURN = {0: Phase.LISTENING, 1: Phase.THINKING}


@pytest.mark.parametrize(
    "num_steps", [150, pytest.param(10_000, marks=pytest.mark.slow, id="ten thousand")]
)
def test_nothing_grows_and_no_lease_leaks(tmp_path: Path, num_steps: int) -> None:
    path = tmp_path / "experts.bin"
    records = write_records(path)
    random = Random(1)
    step_ms: list[float] = []
    rss: list[int] = []
    threads = threading.active_count()
    with open_pager(path, records, num_slots=8, policy="phased", poison=True) as pager:
        for step in range(num_steps):
            start_s = time.perf_counter()
            pager.enter(TURN.get(step % 50, Phase.SPEAKING))
            for layer in range(FIRST_LAYER, FIRST_LAYER + NUM_LAYERS):
                for lease in pager.waves(layer, random.sample(range(NUM_EXPERTS), 2)):
                    if layer < NUM_LAYERS:
                        pager.hint(layer + 1, random.sample(range(NUM_EXPERTS), 2))
                    for expert, slot in lease.slots.items():
                        number = (layer - FIRST_LAYER) * NUM_EXPERTS + expert
                        assert leased_bytes(pager, slot) == content_of(number)
            step_ms.append((time.perf_counter() - start_s) * 1e3)
            if step % (num_steps // 10) == num_steps // 10 - 1:
                gc.collect()
                rss.append(rss_bytes())
                assert pager.num_leased == 0
        pager.drain()
        table = pager.residency.table
        assert table.num_free + int(table.is_ready.sum()) == 8
    assert threading.active_count() == threads
    # Eight loads of 130 kB a step: a leak of one in a hundred shows. Other tests' threads add 2 MB.
    assert rss[-1] - rss[1] < 8_000_000
    tenth = num_steps // 10
    # Medians of tenths: the machine may be busy, so what would grow must grow a lot to be seen.
    assert np.median(step_ms[-tenth:]) < 3 * np.median(step_ms[:tenth])
