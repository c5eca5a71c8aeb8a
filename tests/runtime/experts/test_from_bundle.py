"""A bundle's paging opens with the available memory, and names missing parts."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.manifest import GATES
from deeptalk_edge.bundle.memory import RESERVE_BYTES
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError, DoesNotFit, SettingsError
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.experts import open as from_bundle
from deeptalk_edge.runtime.experts.degrade import DegradeSettings
from deeptalk_edge.runtime.experts.look_ahead import LookAhead
from deeptalk_edge.runtime.experts.open import (
    PagingSettings,
    open_pager,
    paged_experts,
)
from deeptalk_edge.runtime.experts.record_file import RecordFile
from deeptalk_edge.runtime.experts.routes import RouteRecorder
from deeptalk_edge.runtime.experts.sizing import MemoryReading
from tests.runtime.experts.test_engine import PROMPT, answer


def test_a_pool_holds_everything_if_it_fits(bundle: Bundle) -> None:
    with open_pager(bundle, PagingSettings()) as pager:
        assert pager.pool.num_slots == len(bundle.manifest.experts.records)


def test_a_pool_uses_the_remaining_memory(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [RESERVE_BYTES + 8 * 4096]
    monkeypatch.setattr(from_bundle, "read_memory", lambda: MemoryReading(free[0], None))
    with open_pager(bundle, PagingSettings()) as pager:
        assert pager.pool.num_slots == 8
    free[0] -= 1
    with pytest.raises(DoesNotFit, match="8 experts take"):
        open_pager(bundle, PagingSettings())


def test_the_size_of_the_pool_can_be_set(bundle: Bundle) -> None:
    with open_pager(bundle, PagingSettings(pool="50%")) as pager:
        assert pager.pool.num_slots == len(bundle.manifest.experts.records) // 2
    with pytest.raises(SettingsError, match="pool 'most'"):
        open_pager(bundle, PagingSettings(pool="most"))


def test_reading_through_the_page_cache_gives_a_warning(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(from_bundle, "RecordFile", lambda path: RecordFile(path, direct=False))
    with caplog.at_level(logging.WARNING):
        open_pager(bundle, PagingSettings()).close()
    assert "experts.bin: read through the page cache, as asked" in caplog.text


def test_a_bundle_with_routers_looks_ahead_and_answers_the_same(bundle: Bundle) -> None:
    answers, hints = [], []
    for look_ahead in (False, True):
        settings = PagingSettings(pool="5", look_ahead=look_ahead)
        with open_pager(bundle, settings) as pager:
            engine = OrtEngine(
                bundle,
                context_rows=32,
                open_experts=partial(paged_experts, bundle, settings, pager),
            )
            answers.append(answer(engine))
            hints.append(pager.report()["loads"]["hint"])
    np.testing.assert_array_equal(answers[0], answers[1])
    assert hints[0] == 0 < hints[1]


def test_with_all_experts_resident_only_a_recording_makes_predictions(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    predict = LookAhead.predict

    def counted(
        self: LookAhead, layer: int, normed: NDArray[np.float32]
    ) -> NDArray[np.int64] | None:
        asked.append(layer)
        return predict(self, layer, normed)

    monkeypatch.setattr(LookAhead, "predict", counted)
    with open_pager(bundle, PagingSettings()) as pager:
        pager.drain()
        assert pager.has_all
        open_experts = partial(paged_experts, bundle, PagingSettings(), pager)
        engine = OrtEngine(bundle, context_rows=64, open_experts=open_experts)
        answer(engine)
        assert not asked
        engine.experts.recorder = recorder = RouteRecorder()
        engine.decode_step(PROMPT[:2])
        assert asked == list(bundle.manifest.model.decoder.moe_layers)
        assert len(recorder.passes[0].calls[0].predicted) == 2


def test_a_degraded_answer_reads_less_and_its_turn_reports_the_trades(bundle: Bundle) -> None:
    moved, traded = [], []
    for degrade in (None, DegradeSettings(bonus=1.0, protected=1), DegradeSettings(skip_below=0.4)):
        settings = PagingSettings(pool="4", look_ahead=False, degrade=degrade)
        with open_pager(bundle, settings) as pager:
            open_experts = partial(paged_experts, bundle, settings, pager)
            engine = OrtEngine(bundle, context_rows=32, open_experts=open_experts)
            answer(engine)
            counts = engine.experts.end_turn()
            moved.append(counts["misses"])
            traded += [counts["degraded"]] if degrade else []
            assert ("degraded" in counts) is (degrade is not None)
    assert max(moved[1:]) < moved[0]
    preferring, skipping = traded
    assert preferring["substituted"] > 0 == preferring["skipped"]
    assert skipping["skipped"] > 0 == skipping["substituted"]
    for each in (preferring, skipping):
        assert each["uses"] > 0
        assert 0 < each["kept_share"] < 1


def test_a_pager_that_is_not_shared_is_closed_with_the_experts(bundle: Bundle) -> None:
    def readers() -> int:
        return sum(t.name.startswith("expert-reader") for t in threading.enumerate())

    before = readers()
    experts = paged_experts(bundle, PagingSettings())
    assert readers() > before
    experts.close()
    assert readers() == before


def test_a_bonus_without_routers_is_refused(bundle: Bundle) -> None:
    files = {name: entry for name, entry in bundle.manifest.files.items() if name != GATES}
    bundle = Bundle(bundle.path, replace(bundle.manifest, files=files))
    settings = PagingSettings(degrade=DegradeSettings(bonus=0.1))
    with (
        open_pager(bundle, settings) as pager,
        pytest.raises(SettingsError, match=r"needs gates\.npz"),
    ):
        paged_experts(bundle, settings, pager)


def test_routers_of_another_model_are_refused(bundle: Bundle, own_copy: Path) -> None:
    other = Bundle(own_copy, bundle.manifest)
    np.savez(
        other.file(GATES),
        gates=np.zeros((1, 2, 3), np.float32),
        norms=np.ones((1, 3), np.float32),
    )
    settings = PagingSettings()
    with (
        open_pager(other, settings) as pager,
        pytest.raises(ArtifactError, match=r"gates is float32 \(1, 2, 3\), expected float32"),
    ):
        paged_experts(other, settings, pager)
