"""An engine's cache, prompts and sound against ONNX Runtime's, and the CUDA calls of a step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.runtime.backends.base import Backend
from deeptalk_edge.runtime.backends.open import open_backend
from deeptalk_edge.runtime.settings import ConversationSettings
from tests.runtime.backends.tensorrt.drill import FEATURES, MASK, ROWS, Drill
from tests.runtime.backends.tensorrt.emulated_cuda import EmulatedCuda, Mode
from tests.runtime.backends.tensorrt.emulation import gpu, tensorrt_module

Array = NDArray[np.float32]


def opened(bundle: Bundle, *, graphs: bool = True) -> Backend:
    settings = replace(ConversationSettings.of(bundle), cuda_graphs=graphs)
    return open_backend(bundle, "auto", settings.for_backend())


def drilled(bundle: Bundle, *, graphs: bool = True) -> list[Array]:
    backend = opened(bundle, graphs=graphs)
    try:
        return Drill(backend, state_size=bundle.manifest.codec.state_size).run()
    finally:
        backend.close()


def error(found: list[Array], expected: list[Array]) -> float:
    """Largest error relative to the largest value of each array."""
    pairs = list(zip(found, expected, strict=True))
    assert len(pairs) > 100
    return max(float(np.abs(a - b).max() / (np.abs(b).max() or 1)) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize(("form", "most"), [("drill_exact", 1e-5), ("drill_small", 0.06)])
def test_forks_trims_recalls_and_sound_equal_onnx_runtimes(
    form: str, most: float, drill_on_cpu: Bundle, cuda: EmulatedCuda, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(form)
    assert error(drilled(bundle), drilled(drill_on_cpu)) < most
    assert cuda.calls["cudaGraphLaunch"] > 40


@pytest.mark.parametrize("form", ["drill_exact", "drill_small"])
def test_neither_the_order_of_streams_nor_graphs_change_a_bit(
    form: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(form)
    found = []
    modes: list[tuple[Mode, bool]] = [("late", True), ("eager", True), ("late", False)]
    for mode, graphs in modes:
        with tensorrt_module(tmp_path), gpu(mode=mode):
            found.append(drilled(bundle, graphs=graphs))
    for other in found[1:]:
        assert error(other, found[0]) == 0.0


def test_a_device_that_shares_its_memory_reads_files_in_place(
    drill_exact: Bundle, drill_on_cpu: Bundle, tmp_path: Path
) -> None:
    with tensorrt_module(tmp_path), gpu(is_integrated=True) as cuda:
        assert error(drilled(drill_exact), drilled(drill_on_cpu)) < 1e-5
    assert cuda.is_clean


def test_a_step_is_one_launch_two_to_four_copies_and_one_wait(
    drill_exact: Bundle, cuda: EmulatedCuda
) -> None:
    backend = opened(drill_exact)
    engine = backend.engine
    for prompt, copies in ((ROWS[:12], 4), (ROWS[:30], 2)):  # beyond a quarter only one size fits
        engine.reset()
        engine.prefill(prompt, FEATURES[:0], np.zeros(len(prompt), np.bool_))
        before = Counter(cuda.calls)
        engine.decode_step(ROWS[40:41])
        assert cuda.calls - before == {
            "cudaGraphLaunch": 1,
            "cudaMemcpy2DAsync": copies,
            "cudaStreamSynchronize": 1,
            "cudaEventRecord": 2,
            "cudaEventElapsedTime": 1,
        }
    backend.close()


def test_sound_is_decoded_while_a_step_runs(drill_exact: Bundle, cuda: EmulatedCuda) -> None:
    """The codec has a separate stream with a higher priority."""
    backend = opened(drill_exact)
    engine = backend.engine
    engine.prefill(ROWS[:12], FEATURES, MASK)
    engine.feed(ROWS[20:21])
    state = np.zeros(drill_exact.manifest.codec.state_size, np.float32)
    before = cuda.calls["cudaGraphLaunch"], cuda.num_pending
    backend.codec.decode(ROWS[:2, :7] % 32, position=0, length=9, state=state, noise=[])
    assert before == (cuda.calls["cudaGraphLaunch"], cuda.num_pending)  # the step has not been run
    engine.logits()
    assert cuda.num_pending == 0
    assert len(set(cuda.priorities.values())) == 2
    backend.close()


def test_a_row_under_way_may_be_trimmed_away(drill_exact: Bundle, cuda: EmulatedCuda) -> None:
    backend = opened(drill_exact)
    engine = backend.engine
    engine.prefill(ROWS[:12], FEATURES, MASK)
    expected = engine.decode_step(ROWS[20:21]).text.copy()
    engine.trim(12)
    engine.feed(ROWS[30:31])
    engine.trim(12)
    np.testing.assert_array_equal(engine.decode_step(ROWS[20:21]).text, expected)
    backend.close()
