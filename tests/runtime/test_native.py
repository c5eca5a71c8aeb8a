"""The native engine says what ONNX Runtime says on the same weights, however its rows are fed."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.checkpoint import Checkpoint
from deeptalk_edge.errors import ArtifactError, BackendError, DoesNotFit
from deeptalk_edge.expert_record import ExpertDtype
from deeptalk_edge.export.native_weights import (
    NativePrecision,
    native_bytes,
    write_native_weights,
)
from deeptalk_edge.rows import Ids
from deeptalk_edge.runtime.backends import native
from deeptalk_edge.runtime.backends.native import ExpertTables, NativeEngine
from deeptalk_edge.runtime.backends.native_library import NativeContext, NativeLibrary
from deeptalk_edge.runtime.backends.native_weights import ResidentExperts
from deeptalk_edge.runtime.backends.ort import OrtEngine
from deeptalk_edge.runtime.bundle import NATIVE_WEIGHTS, Bundle
from deeptalk_edge.runtime.experts.from_bundle import PagingSettings, paged_experts
from deeptalk_edge.runtime.experts.routes import Modality, RouteRecorder
from deeptalk_edge.runtime.lm.engine import Engine, Logits
from deeptalk_edge.spec import ModelSpec
from deeptalk_edge.training.checkpoint import config_of, save_checkpoint
from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.snac_files import save_snac
from tests.experts.paged_engine import open_bundle_pager
from tests.native.cpu import built
from tests.runtime.models import CODEC, SPEC, byte_level_tokenizer
from tests.runtime.native_bundles import write_bundles
from tests.training.models import random_model

WIDE = replace(
    SPEC,
    decoder=replace(
        SPEC.decoder,
        width=128,
        nope_dim=32,
        rope_dim=6,
        value_dim=10,
        latent_dim=64,
        dense_ffn_width=100,
        expert_ffn_width=64,
    ),
)
"""Rows that int4 can hold, but for o_proj's 40 columns; a dense MLP that ends within a group."""

NO_FEATURES = np.empty((0, WIDE.decoder.width), np.float32)

random = np.random.default_rng(7)
ROWS: Ids = random.integers(0, WIDE.vocabulary.size, (20, 8))
FEATURES = random.normal(size=(5, WIDE.decoder.width)).astype(np.float32)
MASK = np.isin(np.arange(20), [4, 5, 6, 7, 11])

CLOSE = 0.06  # of the logits' spread: int8 activations in every product, a bfloat16 cache


@pytest.fixture(scope="session")
def library() -> NativeLibrary:
    return built.library()


@pytest.fixture(scope="session", params=["int8", "int4"])
def bundles(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Bundle]:
    """A float32 bundle and the native one of the same weights. Shared: never write to them."""
    return random_bundles(WIDE, tmp_path_factory.mktemp("native"), request.param)


@pytest.fixture(scope="session")
def bundle(bundles: tuple[Bundle, Bundle]) -> Bundle:
    return bundles[1]


@pytest.fixture
def engine(bundle: Bundle, library: NativeLibrary) -> Iterator[NativeEngine]:
    engine = NativeEngine(bundle, context_rows=32, library=library)
    yield engine
    engine.close()


def random_bundles(spec: ModelSpec, place: Path, dtype: ExpertDtype) -> tuple[Bundle, Bundle]:
    source = place / "source"
    save_checkpoint(source, random_model(spec), config_of(spec))
    save_snac(Snac(CODEC), source / "snac")
    byte_level_tokenizer().save(str(source / "tokenizer.json"))
    return write_bundles(source, place, dtype=dtype, group=64 if dtype == "int4" else None)


def text_only(rows: Ids) -> NDArray[np.bool_]:
    return np.zeros(len(rows), np.bool_)


def fed(engine: Engine, rows: Ids) -> Logits:
    """The logits behind rows that are fed to an engine from nothing."""
    engine.reset()
    engine.prefill(rows, NO_FEATURES, text_only(rows))
    return copied(engine.logits())


def copied(logits: Logits) -> Logits:
    return Logits(logits.text.copy(), logits.codes.copy())


def assert_equal(found: Logits, expected: Logits) -> None:
    np.testing.assert_array_equal(found.text, expected.text)
    np.testing.assert_array_equal(found.codes, expected.codes)


def assert_close(found: Logits, expected: Logits) -> None:
    for mine, reference in zip(found, expected, strict=True):
        error = np.sqrt(np.mean((mine - reference) ** 2))
        assert error < CLOSE * np.std(reference)


def assert_every_path_is_right(
    bundles: tuple[Bundle, Bundle], library: NativeLibrary, cache_kind: str = "bfloat16"
) -> None:
    reference = OrtEngine(bundles[0], context_rows=32)
    reference.prefill(ROWS, FEATURES, MASK)
    for path in library.path_names:
        engine = NativeEngine(
            bundles[1], context_rows=32, library=library, path=path, cache_kind=cache_kind
        )
        engine.prefill(ROWS, FEATURES, MASK)
        assert_close(engine.logits(), reference.logits())
        engine.close()
    reference.close()


@pytest.mark.parametrize("cache_kind", ["bfloat16", "int8"])
def test_every_path_computes_what_onnx_runtime_does_on_the_same_weights(
    bundles: tuple[Bundle, Bundle], library: NativeLibrary, cache_kind: str
) -> None:
    assert_every_path_is_right(bundles, library, cache_kind)


def test_the_latents_norm_has_an_epsilon_of_its_own(library: NativeLibrary, tmp_path: Path) -> None:
    spec = replace(WIDE, decoder=replace(WIDE.decoder, norm_eps=0.1))
    assert_every_path_is_right(random_bundles(spec, tmp_path, "int8"), library)


def test_a_latent_may_be_wider_than_the_model(library: NativeLibrary, tmp_path: Path) -> None:
    spec = replace(WIDE, decoder=replace(WIDE.decoder, latent_dim=512))
    assert_every_path_is_right(random_bundles(spec, tmp_path, "int8"), library)


@pytest.mark.parametrize("rows_at_once", [1, 3, 7])
def test_prefill_in_parts_is_prefill_at_once_to_the_bit(
    engine: NativeEngine, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    engine.prefill(ROWS, FEATURES, MASK)
    expected = copied(engine.logits())
    engine.reset()
    monkeypatch.setattr(native, "PREFILL_ROWS", rows_at_once)
    engine.prefill(ROWS, FEATURES, MASK)
    assert_equal(engine.logits(), expected)


def test_decoding_row_by_row_is_prefill_to_the_bit(engine: NativeEngine) -> None:
    expected = fed(engine, ROWS)
    engine.reset()
    for row in ROWS:
        logits = engine.decode_step(row[None])
    assert_equal(logits, expected)


def test_two_items_are_two_conversations(engine: NativeEngine) -> None:
    prompt, tails = ROWS[:8], (ROWS[8:12], ROWS[12:16])
    expected = [fed(engine, np.concatenate([prompt, tail])) for tail in tails]
    fed(engine, prompt)
    engine.fork()
    for rows in zip(*tails, strict=True):
        logits = engine.decode_step(np.stack(rows))
    for item in range(2):
        one = Logits(logits.text[item : item + 1], logits.codes[item : item + 1])
        assert_equal(one, expected[item])


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("trimmed_to", [None, 10, 4])
def test_a_kept_item_goes_on_and_a_recalled_one_too(
    engine: NativeEngine, kept: int, trimmed_to: int | None
) -> None:
    prompt, pairs, last = ROWS[:8], ROWS[8:14].reshape(3, 2, 8), ROWS[14:15]
    both = [np.concatenate([prompt, pairs[:, item], last]) for item in range(2)]
    expected = [fed(engine, rows) for rows in both]
    fed(engine, prompt)
    engine.fork()
    for pair in pairs:
        engine.decode_step(pair)
    engine.keep(kept)
    assert_equal(engine.decode_step(last), expected[kept])
    if trimmed_to is not None:  # what the kept item forgets, the other one may still need
        engine.trim(trimmed_to)
    for row in ROWS[15:18]:
        after = engine.decode_step(row[None])
    again = np.concatenate([both[kept][:trimmed_to], ROWS[15:18]])
    after = copied(after)
    engine.recall()
    assert engine.num_rows == 11
    assert_equal(engine.decode_step(last), expected[1 - kept])
    engine.fork()  # a recalled item is whole again
    twice = engine.decode_step(np.concatenate([ROWS[:1], ROWS[1:2]]))
    found = Logits(twice.text[1:].copy(), twice.codes[1:].copy())
    assert_equal(found, fed(engine, np.concatenate([both[1 - kept], ROWS[1:2]])))
    assert_equal(after, fed(engine, again))


def test_a_trimmed_engine_forgets(engine: NativeEngine) -> None:
    expected = fed(engine, np.concatenate([ROWS[:5], ROWS[9:10]]))
    fed(engine, ROWS[:12])
    engine.trim(5)
    assert engine.num_rows == 5
    assert_equal(engine.decode_step(ROWS[9:10]), expected)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(
    bundle: Bundle, engine: NativeEngine, library: NativeLibrary, threads: int
) -> None:
    wide = NativeEngine(bundle, context_rows=32, threads=threads, library=library)
    assert_equal(fed(wide, ROWS), fed(engine, ROWS))
    wide.close()


class Waves:
    """Experts one after another, each at an address that is gone when the next one comes."""

    def __init__(self, bundle: Bundle) -> None:
        decoder = bundle.manifest.model.decoder
        self._resident = ResidentExperts(
            bundle.file(bundle.manifest.experts_file),
            bundle.manifest.records,
            bundle.manifest.record_format,
            num_layers=decoder.num_layers,
            num_experts=decoder.num_experts,
        )
        self._tables = self._resident.tables
        self.begun: list[str] = []
        self.asked: list[list[int]] = []

    def begin_prefill(self, audio_mask: NDArray[np.bool_]) -> None:
        self.begun.append("prefill")

    def begin_step(self, num_items: int) -> None:
        self.begun.append(f"step of {num_items}")

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
    """Forgets the last expert of every layer."""

    def tables(
        self, layer: int, ids: Ids, weights: NDArray[np.float32], normed: NDArray[np.float32]
    ) -> Generator[NDArray[np.uint64], None, None]:
        yield from list(super().tables(layer, ids, weights, normed))[:-1]


class DroppingWaves(Waves):
    """Drops experts in place, as a degrading source may: of each token it keeps the first ones."""

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
    bundle: Bundle, engine: NativeEngine, library: NativeLibrary, num_kept: int
) -> None:
    dropping = NativeEngine(
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
    bundle: Bundle, engine: NativeEngine, library: NativeLibrary
) -> None:
    experts = Waves(bundle)

    def opened() -> ExpertTables:
        return experts

    paged = NativeEngine(bundle, context_rows=32, library=library, open_experts=opened)
    assert_equal(fed(paged, ROWS), fed(engine, ROWS))
    assert_equal(paged.decode_step(ROWS[:1]), engine.decode_step(ROWS[:1]))
    assert len(experts.asked) == 2 * len(bundle.manifest.model.decoder.moe_layers)
    paged.close()
    assert experts.begun == ["prefill", "step of 1", "close"]


@pytest.mark.parametrize("num_slots", [8, 10])
def test_a_pager_of_any_size_does_not_change_a_bit(
    bundle: Bundle, engine: NativeEngine, library: NativeLibrary, num_slots: int
) -> None:
    with open_bundle_pager(bundle, num_slots) as pager:
        paged = NativeEngine(
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


def test_a_prompt_in_parts_is_recorded_in_parts(
    bundle: Bundle, library: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "PREFILL_ROWS", 12)
    experts = paged_experts(bundle, PagingSettings())
    experts.recorder = RouteRecorder()
    paged = NativeEngine(bundle, context_rows=32, library=library, open_experts=lambda: experts)
    paged.prefill(ROWS, FEATURES, MASK)
    paged.close()
    passes = experts.recorder.passes
    assert [each.num_rows for each in passes] == [12, 8]
    modality = [each.calls[0].modality for each in passes]
    np.testing.assert_array_equal(np.concatenate(modality) == Modality.HEARD, MASK)


def test_onnx_runtime_reads_the_same_records(bundles: tuple[Bundle, Bundle]) -> None:
    engines = [OrtEngine(bundle, context_rows=32) for bundle in bundles]
    in_float32, packed = (fed(engine, ROWS) for engine in engines)
    for engine in engines:
        engine.close()
    np.testing.assert_allclose(packed.text, in_float32.text, rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed.codes, in_float32.codes, rtol=0, atol=1e-5)


def test_the_plan_knows_how_large_native_weights_are(bundle: Bundle, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(bundle.path.parent / "checkpoint")
    form = bundle.manifest.record_format
    write_native_weights(checkpoint, form, NativePrecision(), tmp_path)
    assert (tmp_path / NATIVE_WEIGHTS).stat().st_size == native_bytes(WIDE, form)


def test_an_expert_that_never_comes_is_an_error_and_not_a_silence(
    bundle: Bundle, library: NativeLibrary
) -> None:
    paged = NativeEngine(
        bundle, context_rows=32, library=library, open_experts=lambda: MissingWaves(bundle)
    )
    with pytest.raises(BackendError, match="from layer 1 on: an expert that a token chose"):
        fed(paged, ROWS)
    assert paged.num_rows == 0


def test_a_prompt_that_does_not_fit_leaves_the_cache_as_it_was(engine: NativeEngine) -> None:
    fed(engine, ROWS)
    with pytest.raises(DoesNotFit, match="40 rows of conversation, the cache holds 32"):
        engine.prefill(ROWS, FEATURES, MASK)
    assert engine.num_rows == 20


def test_calls_out_of_order_are_refused(engine: NativeEngine) -> None:
    with pytest.raises(ValueError, match="no row was fed"):
        engine.logits()
    with pytest.raises(ValueError, match="4 features for 5 marked rows"):
        engine.prefill(ROWS, FEATURES[1:], MASK)
    with pytest.raises(ValueError, match="2 rows for 1 items"):
        engine.decode_step(ROWS[:2])
    with pytest.raises(ValueError, match="no item was dropped"):
        engine.recall()
    with pytest.raises(ValueError, match="there are 1 items"):
        engine.keep(0)
    engine.fork()
    with pytest.raises(ValueError, match="forked already"):
        engine.fork()
    with pytest.raises(ValueError, match="a prompt has one item"):
        engine.prefill(ROWS, FEATURES, MASK)


def test_what_is_not_finite_or_not_in_the_table_is_an_error(engine: NativeEngine) -> None:
    features = FEATURES.copy()
    features[2, 3] = np.nan
    with pytest.raises(BackendError, match="NaN or infinite"):
        engine.prefill(ROWS, features, MASK)
    with pytest.raises(BackendError, match="outside its table"):
        engine.decode_step(ROWS[:1] + WIDE.vocabulary.size)


def test_a_bundle_without_native_weights_or_with_others_is_refused(
    bundles: tuple[Bundle, Bundle], library: NativeLibrary, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="made for experts"):
        NativeEngine(bundles[0], context_rows=32, library=library)
    with pytest.raises(ArtifactError, match=r"native\.json: no such file"):
        NativeEngine(Bundle(tmp_path, bundles[1].manifest), context_rows=32, library=library)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", r"native\.bin: ends at"),
        ("format", "format 2, this runtime reads 1"),
        ("array", r"layers\.1\.qkv is missing"),
    ],
)
def test_damaged_native_weights_are_refused(
    bundle: Bundle, library: NativeLibrary, tmp_path: Path, damage: str, message: str
) -> None:
    for name in ("native.bin", "native.json", bundle.manifest.experts_file):
        shutil.copy(bundle.path / name, tmp_path / name)
    index = json.loads((tmp_path / "native.json").read_text())
    if damage == "cut":
        index["arrays"]["final_norm"]["offset"] = 1 << 40
        message = "final_norm at 1099511627776 of"
    elif damage == "format":
        index["format"] = 2
    else:
        del index["arrays"]["layers.1.qkv"]
    (tmp_path / "native.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=message):
        NativeEngine(Bundle(tmp_path, bundle.manifest), context_rows=32, library=library)


def test_a_truncated_expert_file_is_refused(
    bundle: Bundle, library: NativeLibrary, tmp_path: Path
) -> None:
    for name in ("native.bin", "native.json", bundle.manifest.experts_file):
        shutil.copy(bundle.path / name, tmp_path / name)
    with (tmp_path / bundle.manifest.experts_file).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match=r"ends at 100, \d+ bytes were expected at 0"):
        NativeEngine(Bundle(tmp_path, bundle.manifest), context_rows=32, library=library)


def test_a_model_that_the_kernels_do_not_take_is_refused(
    bundle: Bundle, library: NativeLibrary
) -> None:
    spec = bundle.manifest.model
    other = replace(spec, decoder=replace(spec.decoder, num_heads=spec.decoder.num_heads + 1))
    manifest = dataclasses.replace(bundle.manifest, model=other)
    with pytest.raises(BackendError, match=r"refuse this model: qkv rows = \d+, expected \("):
        NativeEngine(Bundle(bundle.path, manifest), context_rows=32, library=library)


def test_a_missing_library_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"install a C\+\+ compiler .* or choose the backend ort"
    ):
        NativeLibrary(tmp_path / "libdeeptalk_cpu.so")


def test_an_unknown_kernel_path_is_refused(library: NativeLibrary) -> None:
    with pytest.raises(BackendError, match=r"kernel path avx1: this processor runs .*portable"):
        NativeContext(library, path="avx1")


def test_the_library_knows_a_fast_path_for_this_processor(library: NativeLibrary) -> None:
    flags = Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" else ""
    wanted = [("avx512_vnni", "avx512"), ("avx2", "avx2"), ("avx_vnni", "avx2-vnni")]
    expected = {path for flag, path in wanted if f" {flag}" in flags} | {"portable"}
    assert expected <= set(library.path_names)


def test_an_unknown_int4_group_is_refused() -> None:
    with pytest.raises(ValueError, match="int4 group of 48"):
        NativePrecision(matrix_group=48)
