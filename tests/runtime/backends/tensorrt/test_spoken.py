"""Tier 1: spoken questions through the whole runtime on an emulated TensorRT, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.cli import main
from tests.runtime.backends.tensorrt.emulated_cuda import EmulatedCuda, Mode
from tests.runtime.backends.tensorrt.emulation import gpu, tensorrt_module
from tests.runtime.backends.tensorrt.spoken import QUESTIONS, Spoken, ask, largest_error


def emulated(
    bundle: Bundle, folder: Path, count: int, *, mode: Mode, graphs: bool, **changes: Any
) -> Spoken:
    with tensorrt_module(folder), gpu(mode=mode) as cuda:
        said = ask(bundle, QUESTIONS[:count], interrupt=True, cuda_graphs=graphs, **changes)
    assert cuda.is_clean
    assert bool(cuda.calls["cudaGraphLaunch"]) is graphs
    return said


@pytest.fixture(scope="module")
def on_ort(on_cpu: Bundle) -> Spoken:
    """All questions of the checkpoint, with half of the answers interrupted."""
    return ask(on_cpu, QUESTIONS, interrupt=True, backend="ort")


def test_twenty_four_questions_are_answered_token_for_token_as_on_the_cpu(
    exact: Bundle, on_ort: Spoken, tmp_path: Path
) -> None:
    said = emulated(exact, tmp_path, 24, mode="late", graphs=True)
    assert said.tokens == on_ort.tokens
    assert said.texts == on_ort.texts
    assert len(said.texts) == 24
    assert largest_error(said, on_ort) < 1e-4
    for found, expected in zip(said.sound, on_ort.sound, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_neither_streams_that_run_early_nor_a_lack_of_graphs_change_a_bit(
    exact: Bundle, tmp_path: Path
) -> None:
    expected = emulated(exact, tmp_path / "a", 2, mode="late", graphs=True)
    ways: list[tuple[Mode, bool]] = [("eager", True), ("late", False)]
    for mode, graphs in ways:
        found = emulated(exact, tmp_path / "b", 2, mode=mode, graphs=graphs)
        assert found.tokens == expected.tokens
        assert largest_error(found, expected) == 0.0


@pytest.mark.slow
def test_a_prompt_at_once_through_the_plugin_gives_the_tokens_of_float32(
    small: Bundle, on_ort: Spoken, tmp_path: Path
) -> None:
    said = emulated(small, tmp_path, 2, mode="late", graphs=True)
    assert said.tokens == on_ort.tokens[: len(said.tokens)]
    assert 1e-5 < largest_error(said, _begin(on_ort, said)) < 0.05  # float16 and int8 are at work


def _begin(whole: Spoken, part: Spoken) -> Spoken:
    return Spoken(logits=whole.logits[: len(part.logits)])


def test_the_command_line_answers_with_engines(
    exact: Bundle, cuda: EmulatedCuda, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`--backend auto` chooses engines."""
    out = tmp_path / "answer.wav"
    arguments = ["run", "--bundle", str(exact.path), "--wav", str(QUESTIONS[0])]
    assert main([*arguments, "--json", "--out", str(out)]) == 0
    turn = json.loads(capsys.readouterr().out)
    assert (turn["backend"], turn["kernel_path"]) == ("tensorrt", "TensorRT 10.16.2.1, sm_87")
    assert turn["gpu_ms"] == {"encoder": 0.0, "prefill": 0.0, "step": 0.0, "codec": 0.0}  # emulated
    assert turn["text"] == "eight tickets to berlin that will be eighty pounds"
    assert out.stat().st_size > 2 * 24_000


@pytest.fixture(scope="module")
def on_ort_with_history(on_cpu: Bundle) -> Spoken:
    return ask(on_cpu, QUESTIONS, interrupt=True, backend="ort", max_turns=3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["late", "eager"])
@pytest.mark.parametrize("graphs", [True, False])
def test_every_mode_with_and_without_graphs_gives_the_cpus_tokens(
    mode: Mode, graphs: bool, exact: Bundle, on_ort_with_history: Spoken, tmp_path: Path
) -> None:
    said = emulated(exact, tmp_path, 24, mode=mode, graphs=graphs, max_turns=3)
    assert said.tokens == on_ort_with_history.tokens
    assert said.texts == on_ort_with_history.texts


@pytest.fixture(scope="module")
def small_late(small: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Spoken:
    """Four questions through float16 and the int8 plugin, streams late, with graphs."""
    place = tmp_path_factory.mktemp("small_late")
    return emulated(small, place, 4, mode="late", graphs=True, max_turns=3)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "graphs"), [("eager", True), ("late", False), ("eager", False)])
def test_every_mode_of_the_plugin_gives_the_same_bits(
    mode: Mode, graphs: bool, small: Bundle, small_late: Spoken, tmp_path: Path
) -> None:
    said = emulated(small, tmp_path, 4, mode=mode, graphs=graphs, max_turns=3)
    assert said.tokens == small_late.tokens
    assert largest_error(said, small_late) == 0.0


@pytest.mark.slow
def test_float16_and_int8_change_single_codes_and_no_word(
    small_late: Spoken, on_ort_with_history: Spoken
) -> None:
    """Rounding may move a codec id to its neighbour; after that, rows of the answer differ."""
    assert small_late.texts == on_ort_with_history.texts[:4]
    pairs = list(zip(small_late.tokens, on_ort_with_history.tokens, strict=False))
    assert sum(a == b for a, b in pairs) > 0.7 * len(pairs)
