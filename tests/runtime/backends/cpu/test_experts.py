"""Experts in waves, from a pager, or dropped change no bit of the other experts' sum."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import BackendError
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.backends.cpu import engine as native
from deeptalk_edge.runtime.backends.cpu.engine import CpuEngine, ExpertTables
from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.experts.degrade import DegradeSettings
from deeptalk_edge.runtime.experts.open import PagingSettings, paged_experts
from deeptalk_edge.runtime.experts.routes import Modality, RouteRecorder
from tests.runtime.backends.cpu.random_bundles import FEATURES, assert_equal, fed
from tests.runtime.backends.cpu.resident import Resident
from tests.runtime.experts.paged_engine import open_bundle_pager
from tests.runtime.fed import MASK, ROWS, own_experts


class Waves(Resident):
    """Experts one after another, each at an address that is invalid after the next one."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.begun: list[str] = []
        self.asked: list[list[int]] = []

    def begin_prefill(self, audio_mask: NDArray[np.bool_]) -> None:
        self.begun.append("prefill")

    def begin_step(self, num_items: int) -> None:
        self.begun.append(f"step of {num_items}")

    def all_resident(self) -> AbstractContextManager[bool]:
        return nullcontext(False)

    def tables(
        self, layer: int, ids: Ids, weights: NDArray[np.float32], normed: NDArray[np.float32]
    ) -> Generator[NDArray[np.uint64], None, None]:
        assert weights.shape == ids.shape
        assert np.isfinite(normed).all()
        self.asked.append(np.unique(ids).tolist())
        for expert in np.unique(ids):
            table = np.zeros_like(self._tables[layer])
            table[expert] = self._tables[layer, expert]
            yield table

    def close(self) -> None:
        self.begun.append("close")


class MissingWaves(Waves):
    """Omits the last expert of every layer."""

    def tables(
        self, layer: int, ids: Ids, weights: NDArray[np.float32], normed: NDArray[np.float32]
    ) -> Generator[NDArray[np.uint64], None, None]:
        yield from list(super().tables(layer, ids, weights, normed))[:-1]


class DroppingWaves(Waves):
    """Drops experts in place, like `degrade`: it keeps the first ones of each token."""

    def __init__(self, bundle: Bundle, num_kept: int) -> None:
        super().__init__(bundle)
        self._kept = slice(num_kept)

    def tables(
        self, layer: int, ids: Ids, weights: NDArray[np.float32], normed: NDArray[np.float32]
    ) -> Generator[NDArray[np.uint64], None, None]:
        weights[:, self._kept.stop :] = 0
        yield from super().tables(layer, ids[:, self._kept], weights[:, self._kept], normed)


@pytest.mark.parametrize("num_kept", [0, 1])
def test_experts_that_were_dropped_are_not_waited_for(
    bundle: Bundle, engine: CpuEngine, library: CpuLibrary, num_kept: int
) -> None:
    dropping = CpuEngine(
        bundle,
        context_rows=32,
        library=library,
        open_experts=lambda: DroppingWaves(bundle, num_kept),
    )
    found, exact = fed(dropping, ROWS), fed(engine, ROWS)
    dropping.close()
    assert np.isfinite(found.text).all()
    assert (found.text != exact.text).any()


def test_paged_experts_do_not_change_a_bit(
    bundle: Bundle, engine: CpuEngine, library: CpuLibrary
) -> None:
    experts = Waves(bundle)

    def opened() -> ExpertTables:
        return experts

    paged = CpuEngine(bundle, context_rows=32, library=library, open_experts=opened)
    assert_equal(fed(paged, ROWS), fed(engine, ROWS))
    assert_equal(paged.decode_step(ROWS[:1]), engine.decode_step(ROWS[:1]))
    assert len(experts.asked) == 2 * len(bundle.manifest.model.decoder.moe_layers)
    paged.close()
    assert experts.begun == ["prefill", "step of 1", "close"]


@pytest.mark.parametrize("num_slots", [8, 10])
def test_a_pager_of_any_size_does_not_change_a_bit(
    bundle: Bundle, engine: CpuEngine, library: CpuLibrary, num_slots: int
) -> None:
    with open_bundle_pager(bundle, num_slots) as pager:
        paged = CpuEngine(
            bundle,
            context_rows=32,
            library=library,
            open_experts=lambda: paged_experts(bundle, PagingSettings(), pager),
        )
        assert_equal(fed(paged, ROWS), fed(engine, ROWS))
        for row in ROWS[:8]:
            assert_equal(paged.decode_step(row[None]), engine.decode_step(row[None]))
        assert pager.num_leased == 0
        paged.close()


def test_a_pass_with_all_experts_resident_makes_no_requests_and_changes_no_bit(
    bundle: Bundle, engine: CpuEngine, library: CpuLibrary
) -> None:
    num_records = len(bundle.manifest.experts.records)
    with open_bundle_pager(bundle, num_records, fills=True) as pager:
        experts = paged_experts(bundle, PagingSettings(), pager)
        paged = CpuEngine(bundle, context_rows=32, library=library, open_experts=lambda: experts)
        pager.idle()
        pager.drain()
        assert_equal(fed(paged, ROWS), fed(engine, ROWS))
        assert_equal(paged.decode_step(ROWS[:1]), engine.decode_step(ROWS[:1]))
        report = pager.report()
        assert (report["all_resident_passes"], report["hits"], report["misses"]) == (2, 0, 0)
        experts.recorder = RouteRecorder()  # needs every routing
        assert_equal(paged.decode_step(ROWS[1:2]), engine.decode_step(ROWS[1:2]))
        recorded = [call.layer for call in experts.recorder.passes[-1].calls]
        assert recorded == list(bundle.manifest.model.decoder.moe_layers)
        assert pager.report()["all_resident_passes"] == 2
        paged.close()


def test_a_degrading_source_gets_every_routing(bundle: Bundle, library: CpuLibrary) -> None:
    num_records = len(bundle.manifest.experts.records)
    with open_bundle_pager(bundle, num_records, fills=True) as pager:
        settings = PagingSettings(degrade=DegradeSettings(skip_below=0.01))
        paged = CpuEngine(
            bundle,
            context_rows=32,
            library=library,
            open_experts=lambda: paged_experts(bundle, settings, pager),
        )
        pager.idle()
        pager.drain()
        fed(paged, ROWS)
        report = pager.report()
        assert report["all_resident_passes"] == 0
        assert report["hits"] > 0
        paged.close()


def test_a_prompt_in_parts_is_recorded_in_parts(
    bundle: Bundle, library: CpuLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "PREFILL_ROWS", 12)
    experts = paged_experts(bundle, PagingSettings())
    experts.recorder = RouteRecorder()
    paged = CpuEngine(bundle, context_rows=32, library=library, open_experts=lambda: experts)
    paged.prefill(ROWS, FEATURES, MASK)
    paged.close()
    passes = experts.recorder.passes
    assert [each.num_rows for each in passes] == [12, 8]
    modality = [each.calls[0].modality for each in passes]
    np.testing.assert_array_equal(np.concatenate(modality) == Modality.HEARD, MASK)


def test_an_expert_that_is_never_loaded_is_an_error(bundle: Bundle, library: CpuLibrary) -> None:
    paged = CpuEngine(
        bundle, context_rows=32, library=library, open_experts=lambda: MissingWaves(bundle)
    )
    with pytest.raises(BackendError, match="from layer 1 on: an expert that a token chose"):
        fed(paged, ROWS)
    assert paged.num_rows == 0


def test_onnx_runtime_reads_the_same_records(bundles: tuple[Bundle, Bundle]) -> None:
    engines = [
        OrtEngine(bundle, context_rows=32, open_experts=own_experts(bundle)) for bundle in bundles
    ]
    in_float32, packed = (fed(engine, ROWS) for engine in engines)
    for engine in engines:
        engine.close()
    np.testing.assert_allclose(packed.text, in_float32.text, rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed.codes, in_float32.codes, rtol=0, atol=1e-5)
