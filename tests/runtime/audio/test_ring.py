"""The callbacks' ring keeps the order of samples and counts lost ones."""

from __future__ import annotations

import threading

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deeptalk_edge.runtime.audio.ring import SampleRing


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=60))
def test_samples_come_in_order_and_the_dropped_ones_are_counted(
    steps: list[tuple[bool, int]],
) -> None:
    ring = SampleRing(40, 20, np.int64)
    pushed = popped = 0
    for is_push, count in steps:
        if is_push:
            ring.push(np.arange(pushed, pushed + count))
            pushed += count
            continue
        samples = ring.pop(count)
        if samples is None:
            assert ring.available < count
            continue
        first = popped + ring.num_dropped
        assert list(samples) == list(range(first, first + count))
        popped += count
    assert ring.available == min(pushed - popped - ring.num_dropped, 40)


def test_a_reader_that_is_overtaken_never_sees_mixed_samples() -> None:
    ring = SampleRing(600, 60, np.int64)
    num_blocks = 20_000

    def push_all() -> None:
        for block in range(num_blocks):
            ring.push(np.arange(60 * block, 60 * block + 60))

    pusher = threading.Thread(target=push_all)
    pusher.start()
    popped = 0
    while pusher.is_alive() or ring.available >= 100:
        samples = ring.pop(100)
        if samples is not None:
            assert (np.diff(samples) == 1).all()
            popped += 100
            assert samples[-1] == popped + ring.num_dropped - 1
    pusher.join()
    assert popped + ring.num_dropped + ring.available == 60 * num_blocks
