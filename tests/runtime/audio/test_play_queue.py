"""The device gets the written samples, counted; flushes and ducking do not click."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.runtime.audio.play_queue import PlayQueue, Taken

Array = NDArray[np.float32]
BLOCK = 480
FADE = 120


def queue_of(pcm: Array | None = None) -> PlayQueue:
    queue = PlayQueue(seconds=0.1, block_samples=BLOCK)
    if pcm is not None:
        queue.write(pcm)
    return queue


def take(queue: PlayQueue) -> tuple[Array, Taken]:
    block = np.full(BLOCK, 9, np.float32)
    return block, queue.take(block)


def ones(count: int) -> Array:
    return np.ones(count, np.float32)


@given(st.lists(st.integers(0, 900), max_size=12))
def test_every_sample_comes_out_once_in_order(sizes: list[int]) -> None:
    queue, written = queue_of(), 0
    heard: list[float] = []
    for size in sizes:
        pcm = np.arange(written, written + size, dtype=np.float32) + 1
        queue.write(pcm)
        written += size
        while queue.queued > BLOCK:
            block, taken = take(queue)
            assert taken == (len(heard), BLOCK)
            heard += list(block)
    block, taken = take(queue)
    heard += list(block[: taken.size])
    assert not block[taken.size :].any()
    assert queue.handed == written == len(heard)
    np.testing.assert_allclose(heard[FADE:], np.arange(FADE, written) + 1)


def test_sound_fades_in_and_then_is_unchanged() -> None:
    block, _ = take(queue_of(ones(BLOCK)))
    np.testing.assert_allclose(block[:FADE], np.arange(1, FADE + 1) / FADE, rtol=1e-6)
    assert (block[FADE:] == 1).all()


def test_sound_after_an_underrun_fades_in() -> None:
    queue = queue_of(ones(700))
    for _ in range(2):
        take(queue)
    queue.write(ones(BLOCK))
    block, _ = take(queue)
    np.testing.assert_allclose(block[:FADE], np.arange(1, FADE + 1) / FADE, rtol=1e-6)


def test_a_full_queue_refuses_and_keeps_what_it_has() -> None:
    queue = queue_of(ones(2000))
    with pytest.raises(DoesNotFit, match="holds 2400 samples and has room for 400, found 401"):
        queue.write(ones(401))
    assert queue.queued == 2000


def test_a_flush_fades_5_ms_that_count_and_drops_the_rest() -> None:
    queue = queue_of(ones(2000))
    take(queue)
    assert queue.flush() == BLOCK + FADE
    assert queue.queued == FADE
    block, taken = take(queue)
    assert taken == (BLOCK, FADE)
    assert (np.diff(block[:FADE]) < 0).all()
    assert block[0] > 0.98
    assert not block[FADE - 1 :].any()
    assert queue.handed == BLOCK + FADE
    assert queue.num_underruns == 0


@pytest.mark.parametrize("left", [0, 1, 50])
def test_a_flush_of_less_than_a_fade_fades_all_of_it(left: int) -> None:
    queue = queue_of(ones(BLOCK + left))
    take(queue)
    assert queue.flush() == BLOCK + left
    block, _ = take(queue)
    assert not block[max(left - 1, 0) :].any()


def test_sound_after_a_flush_follows_the_fade_and_a_second_flush_drops_it() -> None:
    queue = queue_of(ones(2000))
    take(queue)
    queue.flush()
    queue.write(-ones(1000))
    block, taken = take(queue)
    assert taken == (BLOCK, BLOCK)
    assert (block[: FADE - 1] > 0).all()
    assert (block[FADE:] < 0).all()
    handed = queue.flush()
    queue.write(ones(300))
    assert queue.flush() == handed == BLOCK + BLOCK + FADE


def test_a_duck_is_a_ramp_of_10_ms_at_most() -> None:
    queue = queue_of(ones(4 * BLOCK))
    blocks = [take(queue)[0]]
    for gain in (0.25, 1.0):
        queue.set_gain(gain)
        blocks.append(take(queue)[0])
        np.testing.assert_allclose(blocks[-1][240:], gain)
    assert np.abs(np.diff(np.concatenate(blocks))).max() < 0.01


def test_an_underrun_is_counted_once_and_a_finished_queue_has_none() -> None:
    queue = queue_of(ones(100))
    take(queue)
    take(queue)
    assert queue.num_underruns == 1
    queue.write(ones(100))
    queue.finish()
    take(queue)
    assert queue.num_underruns == 1


def test_positions_begin_at_0_after_a_rewind() -> None:
    queue = queue_of(ones(1000))
    take(queue)
    queue.rewind()
    assert (queue.queued, queue.handed) == (0, 0)
    assert take(queue)[1] == (0, 0)
