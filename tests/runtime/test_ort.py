"""The engine computes what the torch model does, however its rows are fed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deeptalk_edge.errors import ArtifactError, BackendError, DoesNotFit
from deeptalk_edge.rows import Ids
from deeptalk_edge.runtime.backends import ort
from deeptalk_edge.runtime.backends.ort import OrtEngine, OrtGraph
from deeptalk_edge.runtime.bundle import Bundle
from deeptalk_edge.runtime.lm.engine import Logits
from deeptalk_edge.training.checkpoint import load_model
from tests.runtime.models import SPEC

NO_FEATURES = np.empty((0, SPEC.decoder.width), np.float32)
TOLERANCE = 2e-4  # float32 sums in another order, logits of size 10

random = np.random.default_rng(7)
ROWS: Ids = random.integers(0, SPEC.vocabulary.size, (20, 8))
FEATURES = random.normal(size=(5, SPEC.decoder.width)).astype(np.float32)
MASK = np.isin(np.arange(20), [4, 5, 6, 7, 11])


@pytest.fixture
def engine(bundle: Bundle) -> Iterator[OrtEngine]:
    engine = OrtEngine(bundle, context_rows=32)
    yield engine
    engine.close()


def text_only(rows: Ids) -> NDArray[np.bool_]:
    return np.zeros(len(rows), np.bool_)


def copied(logits: Logits) -> Logits:
    return Logits(logits.text.copy(), logits.codes.copy())


def assert_close(found: Logits, expected: Logits) -> None:
    np.testing.assert_allclose(found.text, expected.text, atol=TOLERANCE)
    np.testing.assert_allclose(found.codes, expected.codes, atol=TOLERANCE)


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
    engine.prefill(ROWS, FEATURES, MASK)
    expected = copied(engine.logits())
    engine.reset()
    monkeypatch.setattr(ort, "PREFILL_ROWS", rows_at_once)
    engine.prefill(ROWS, FEATURES, MASK)
    assert_close(engine.logits(), expected)


def test_decoding_row_by_row_equals_prefill(engine: OrtEngine) -> None:
    engine.prefill(ROWS, NO_FEATURES, text_only(ROWS))
    expected = copied(engine.logits())
    engine.reset()
    for row in ROWS:
        logits = engine.decode_step(row[None])
    assert_close(logits, expected)


def test_two_items_are_two_conversations(engine: OrtEngine) -> None:
    prompt, tails = ROWS[:8], (ROWS[8:12], ROWS[12:16])
    expected = []
    for tail in tails:
        engine.reset()
        both = np.concatenate([prompt, tail])
        engine.prefill(both, NO_FEATURES, text_only(both))
        expected.append(copied(engine.logits()))
    engine.reset()
    engine.prefill(prompt, NO_FEATURES, text_only(prompt))
    engine.fork()
    for rows in zip(*tails, strict=True):
        logits = engine.decode_step(np.stack(rows))
    for item in range(2):
        one = Logits(logits.text[item : item + 1], logits.codes[item : item + 1])
        assert_close(one, expected[item])


@pytest.mark.parametrize("kept", [0, 1])
def test_a_kept_item_goes_on_and_a_recalled_one_too(engine: OrtEngine, kept: int) -> None:
    prompt, pairs, last = ROWS[:8], ROWS[8:14].reshape(3, 2, 8), ROWS[14:15]
    engine.prefill(prompt, NO_FEATURES, text_only(prompt))
    engine.fork()
    for pair in pairs:
        engine.decode_step(pair)
    engine.keep(kept)
    alone = copied(engine.decode_step(last))
    engine.decode_step(ROWS[15:16])  # what the kept item does more is not the other one's
    engine.recall()
    recalled = copied(engine.decode_step(last))
    for logits, item in ((alone, kept), (recalled, 1 - kept)):
        engine.reset()
        rows = np.concatenate([prompt, pairs[:, item], last])
        engine.prefill(rows, NO_FEATURES, text_only(rows))
        assert_close(engine.logits(), logits)


def test_a_trimmed_engine_forgets(engine: OrtEngine) -> None:
    engine.prefill(ROWS[:5], NO_FEATURES, text_only(ROWS[:5]))
    expected = copied(engine.decode_step(ROWS[9:10]))
    engine.decode_step(ROWS[10:11])
    engine.trim(5)
    assert engine.num_rows == 5
    assert_close(engine.decode_step(ROWS[9:10]), expected)


def test_threads_do_not_change_what_is_said(bundle: Bundle, engine: OrtEngine) -> None:
    engine.prefill(ROWS, FEATURES, MASK)
    expected = copied(engine.logits())
    wide = OrtEngine(bundle, context_rows=32, threads=2)
    wide.prefill(ROWS, FEATURES, MASK)
    assert_close(wide.logits(), expected)
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
        OrtEngine(other, context_rows=32)


def test_a_graph_that_does_not_load_is_named(tmp_path: Path) -> None:
    path = tmp_path / "head.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"head\.onnx: ONNX Runtime .* refuses it"):
        OrtGraph(path, threads=1)


def test_a_graph_that_does_not_run_is_named(bundle: Bundle) -> None:
    graph = OrtGraph(bundle.file("encoder.onnx"), threads=1)
    with pytest.raises(BackendError, match=r"encoder\.onnx: failed to run"):
        graph.run({"log_mel": np.zeros((1, 2, 3), np.float32)})
