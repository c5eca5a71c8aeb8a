"""The engine computes what the torch model does, however its rows are fed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError, BackendError, DoesNotFit
from deeptalk_edge.runtime.backends.ort import engine as ort
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.backends.ort.graph import OrtGraph, int8_saturates
from deeptalk_edge.runtime.lm.engine import Logits
from deeptalk_edge.training.checkpoint import load_model
from tests.runtime.fed import (
    MASK,
    ROWS,
    copied,
    decoded,
    features_of,
    forked,
    heard,
    own_experts,
    written,
)
from tests.runtime.speaking_checkpoint import SPEC

WIDTH = SPEC.decoder.width
TOLERANCE = 2e-4  # float32 sums in another order, logits of size 10
FEATURES = features_of(WIDTH)


@pytest.fixture
def engine(bundle: Bundle) -> Iterator[OrtEngine]:
    engine = OrtEngine(bundle, context_rows=32, open_experts=own_experts(bundle))
    yield engine
    engine.close()


def assert_close(found: Logits, expected: Logits) -> None:
    np.testing.assert_allclose(found.text, expected.text, atol=TOLERANCE)
    np.testing.assert_allclose(found.codes, expected.codes, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("flags", "saturates"),
    [("avx2 fma avx_vnni", False), ("avx512f avx512_vnni", False), ("avx2 fma", True)],
)
def test_int8_sums_need_the_exact_form_where_there_is_no_vnni(
    tmp_path: Path, flags: str, saturates: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: fpu {flags} sse2\n")
    assert int8_saturates(tmp_path / "cpuinfo") is saturates
    assert int8_saturates(tmp_path / "absent")


def test_logits_equal_the_torch_models(bundle: Bundle, engine: OrtEngine) -> None:
    model = load_model(bundle.path.parent / "checkpoint")
    features = np.zeros((len(ROWS), SPEC.decoder.width), np.float32)
    features[MASK] = FEATURES
    with torch.inference_mode():
        hidden = model(
            torch.from_numpy(ROWS)[None],
            torch.from_numpy(features)[None],
            torch.from_numpy(MASK)[None],
        )[:, -1]
        expected = Logits(model.text_logits(hidden).numpy(), model.code_logits(hidden).numpy())
    engine.prefill(ROWS, FEATURES, MASK)
    assert_close(engine.logits(), expected)


@pytest.mark.parametrize("rows_at_once", [1, 3, 7])
def test_prefill_in_parts_equals_prefill_at_once(
    engine: OrtEngine, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    expected = heard(engine, FEATURES)
    monkeypatch.setattr(ort, "PREFILL_ROWS", rows_at_once)
    assert_close(heard(engine, FEATURES), expected)


def test_decoding_row_by_row_equals_prefill(engine: OrtEngine) -> None:
    assert_close(decoded(engine, ROWS), written(engine, ROWS, WIDTH))


def test_two_items_do_not_affect_each_other(engine: OrtEngine) -> None:
    prompt, tails = ROWS[:8], (ROWS[8:12], ROWS[12:16])
    expected = [written(engine, np.concatenate([prompt, tail]), WIDTH) for tail in tails]
    written(engine, prompt, WIDTH)
    for found, alone in zip(forked(engine, tails), expected, strict=True):
        assert_close(found, alone)


@pytest.mark.parametrize("kept", [0, 1])
def test_a_kept_item_and_a_recalled_one_continue(engine: OrtEngine, kept: int) -> None:
    prompt, pairs, last = ROWS[:8], ROWS[8:14].reshape(3, 2, 8), ROWS[14:15]
    written(engine, prompt, WIDTH)
    engine.fork()
    for pair in pairs:
        engine.decode_step(pair)
    engine.keep(kept)
    alone = copied(engine.decode_step(last))
    engine.decode_step(ROWS[15:16])  # further rows of the kept item do not affect the other one
    engine.recall()
    recalled = copied(engine.decode_step(last))
    for logits, item in ((alone, kept), (recalled, 1 - kept)):
        rows = np.concatenate([prompt, pairs[:, item], last])
        assert_close(written(engine, rows, WIDTH), logits)


def test_a_trimmed_engine_equals_one_that_was_never_fed_the_rows(engine: OrtEngine) -> None:
    written(engine, ROWS[:5], WIDTH)
    expected = copied(engine.decode_step(ROWS[9:10]))
    engine.decode_step(ROWS[10:11])
    engine.trim(5)
    assert engine.num_rows == 5
    assert_close(engine.decode_step(ROWS[9:10]), expected)


def test_threads_do_not_change_the_logits(bundle: Bundle, engine: OrtEngine) -> None:
    wide = OrtEngine(bundle, context_rows=32, threads=2, open_experts=own_experts(bundle))
    assert_close(heard(wide, FEATURES), heard(engine, FEATURES))
    wide.close()


def test_a_prompt_that_does_not_fit_leaves_the_cache_as_it_was(
    engine: OrtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "PREFILL_ROWS", 6)
    engine.prefill(ROWS, FEATURES, MASK)
    with pytest.raises(DoesNotFit, match="40 rows of conversation, the cache holds 32"):
        engine.prefill(ROWS, FEATURES, MASK)
    assert engine.num_rows == 20


def test_logits_without_a_row_are_refused(engine: OrtEngine) -> None:
    with pytest.raises(ValueError, match="no row was fed"):
        engine.logits()


def test_features_must_match_their_rows(engine: OrtEngine) -> None:
    with pytest.raises(ValueError, match="4 features for 5 marked rows"):
        engine.prefill(ROWS, FEATURES[1:], MASK)


def test_a_bundle_for_another_backend_is_refused(bundle: Bundle) -> None:
    target = dataclasses.replace(bundle.manifest.target, backend="tensorrt")
    other = Bundle(bundle.path, dataclasses.replace(bundle.manifest, target=target))
    with pytest.raises(ArtifactError, match="made for the backend tensorrt, this is ort"):
        OrtEngine(other, context_rows=32, open_experts=own_experts(other))


def test_a_graph_that_does_not_load_is_named(tmp_path: Path) -> None:
    path = tmp_path / "head.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"head\.onnx: ONNX Runtime .* refuses it"):
        OrtGraph(path, threads=1)


def test_a_graph_that_does_not_run_is_named(bundle: Bundle) -> None:
    graph = OrtGraph(bundle.file("encoder.onnx"), threads=1)
    with pytest.raises(BackendError, match=r"encoder\.onnx: failed to run"):
        graph.run({"log_mel": np.zeros((1, 2, 3), np.float32)})
