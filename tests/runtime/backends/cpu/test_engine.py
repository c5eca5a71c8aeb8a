"""The CPU engine computes ONNX Runtime's logits from the same weights, however rows are fed."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.bundle.expert_record import ExpertDtype
from deeptalk_edge.bundle.manifest import NATIVE_WEIGHTS
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.export.packed.cpu_weights import (
    CpuPrecision,
    native_bytes,
    write_native_weights,
)
from deeptalk_edge.runtime.backends.cpu import engine as native
from deeptalk_edge.runtime.backends.cpu.engine import CpuEngine
from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.lm.engine import Logits
from tests.runtime.backends.cpu.random_bundles import (
    FEATURES,
    WIDE,
    assert_equal,
    fed,
    random_bundles,
)
from tests.runtime.fed import MASK, ROWS, copied, decoded, forked, heard, own_experts

CLOSE = 0.06  # share of the logits' spread: int8 activations in every product, a bfloat16 cache


def assert_close(found: Logits, expected: Logits) -> None:
    for mine, reference in zip(found, expected, strict=True):
        error = np.sqrt(np.mean((mine - reference) ** 2))
        assert error < CLOSE * np.std(reference)


def assert_every_path_is_right(
    bundles: tuple[Bundle, Bundle], library: CpuLibrary, cache_kind: str = "bfloat16"
) -> None:
    reference = OrtEngine(bundles[0], context_rows=32, open_experts=own_experts(bundles[0]))
    reference.prefill(ROWS, FEATURES, MASK)
    for path in library.path_names:
        engine = CpuEngine(
            bundles[1],
            context_rows=32,
            library=library,
            path=path,
            cache_kind=cache_kind,
            open_experts=own_experts(bundles[1]),
        )
        engine.prefill(ROWS, FEATURES, MASK)
        assert_close(engine.logits(), reference.logits())
        engine.close()
    reference.close()


@pytest.mark.parametrize("cache_kind", ["bfloat16", "int8"])
def test_every_path_computes_what_onnx_runtime_does_on_the_same_weights(
    bundles: tuple[Bundle, Bundle], library: CpuLibrary, cache_kind: str
) -> None:
    assert_every_path_is_right(bundles, library, cache_kind)


def test_the_latent_norm_has_another_epsilon(library: CpuLibrary, tmp_path: Path) -> None:
    spec = replace(WIDE, decoder=replace(WIDE.decoder, norm_eps=0.1))
    assert_every_path_is_right(random_bundles(spec, tmp_path, "int8"), library)


def test_a_latent_may_be_wider_than_the_model(library: CpuLibrary, tmp_path: Path) -> None:
    spec = replace(WIDE, decoder=replace(WIDE.decoder, latent_dim=512))
    assert_every_path_is_right(random_bundles(spec, tmp_path, "int8"), library)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_an_untied_head_and_layers_without_shared_experts_are_computed_correctly(
    library: CpuLibrary, tmp_path: Path, dtype: ExpertDtype
) -> None:
    decoder = replace(WIDE.decoder, normalise_top_k=True, routed_scale=2.5, num_shared_experts=0)
    spec = replace(WIDE, decoder=decoder, tied_head=False)
    bundles = random_bundles(spec, tmp_path, dtype)
    assert_every_path_is_right(bundles, library)
    if dtype == "int8":
        form = bundles[1].manifest.record_format
        assert bundles[1].file(NATIVE_WEIGHTS).stat().st_size == native_bytes(spec, form)


def test_the_weight_of_a_single_expert_is_scaled_and_not_normalised(
    library: CpuLibrary, tmp_path: Path
) -> None:
    decoder = replace(WIDE.decoder, normalise_top_k=True, routed_scale=2.5, top_k=1)
    bundles = random_bundles(replace(WIDE, decoder=decoder), tmp_path, "int8")
    assert_every_path_is_right(bundles, library)


@pytest.mark.parametrize("rows_at_once", [1, 3, 7])
def test_prefill_in_parts_equals_prefill_at_once_to_the_bit(
    engine: CpuEngine, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    expected = heard(engine, FEATURES)
    monkeypatch.setattr(native, "PREFILL_ROWS", rows_at_once)
    assert_equal(heard(engine, FEATURES), expected)


def test_decoding_row_by_row_equals_prefill_to_the_bit(engine: CpuEngine) -> None:
    assert_equal(decoded(engine, ROWS), fed(engine, ROWS))


def test_two_items_do_not_affect_each_other(engine: CpuEngine) -> None:
    prompt, tails = ROWS[:8], (ROWS[8:12], ROWS[12:16])
    expected = [fed(engine, np.concatenate([prompt, tail])) for tail in tails]
    fed(engine, prompt)
    for found, alone in zip(forked(engine, tails), expected, strict=True):
        assert_equal(found, alone)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("trimmed_to", [None, 10, 4])
def test_a_kept_item_and_a_recalled_one_continue(
    engine: CpuEngine, kept: int, trimmed_to: int | None
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
    if trimmed_to is not None:  # the other item may still need rows that the kept one drops
        engine.trim(trimmed_to)
    for row in ROWS[15:18]:
        after = engine.decode_step(row[None])
    again = np.concatenate([both[kept][:trimmed_to], ROWS[15:18]])
    after = copied(after)
    engine.recall()
    assert engine.num_rows == 11
    assert_equal(engine.decode_step(last), expected[1 - kept])
    engine.fork()  # a recalled item has all its rows
    twice = engine.decode_step(np.concatenate([ROWS[:1], ROWS[1:2]]))
    found = Logits(twice.text[1:].copy(), twice.codes[1:].copy())
    assert_equal(found, fed(engine, np.concatenate([both[1 - kept], ROWS[1:2]])))
    assert_equal(after, fed(engine, again))


def test_a_trimmed_engine_equals_one_that_was_never_fed_the_rows(engine: CpuEngine) -> None:
    expected = fed(engine, np.concatenate([ROWS[:5], ROWS[9:10]]))
    fed(engine, ROWS[:12])
    engine.trim(5)
    assert engine.num_rows == 5
    assert_equal(engine.decode_step(ROWS[9:10]), expected)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(
    bundle: Bundle, engine: CpuEngine, library: CpuLibrary, threads: int
) -> None:
    wide = CpuEngine(
        bundle, context_rows=32, threads=threads, library=library, open_experts=own_experts(bundle)
    )
    assert_equal(fed(wide, ROWS), fed(engine, ROWS))
    wide.close()


def test_the_plan_knows_how_large_native_weights_are(bundle: Bundle, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(bundle.path.parent / "checkpoint")
    form = bundle.manifest.record_format
    write_native_weights(checkpoint, form, CpuPrecision(), tmp_path)
    assert (tmp_path / NATIVE_WEIGHTS).stat().st_size == native_bytes(WIDE, form)


def test_the_library_knows_a_fast_path_for_this_processor(library: CpuLibrary) -> None:
    flags = Path("/proc/cpuinfo").read_text() if platform.machine() == "x86_64" else ""
    wanted = [
        ("avx512_vnni", "avx512"),
        ("avx512_vnni", "avx512-intel"),
        ("avx2", "avx2"),
        ("avx_vnni", "avx2-vnni"),
    ]
    expected = {path for flag, path in wanted if f" {flag}" in flags} | {"portable"}
    assert expected <= set(library.path_names)
