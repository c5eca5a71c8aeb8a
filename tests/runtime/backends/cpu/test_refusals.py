"""The CPU engine refuses calls out of order, invalid numbers and invalid files."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError, BackendError, DoesNotFit
from deeptalk_edge.export.packed.cpu_weights import (
    CpuPrecision,
)
from deeptalk_edge.runtime.backends.cpu.engine import CpuEngine
from deeptalk_edge.runtime.backends.cpu.library import CpuContext, CpuLibrary
from tests.runtime.backends.cpu.random_bundles import FEATURES, WIDE, fed
from tests.runtime.backends.cpu.resident import Resident
from tests.runtime.fed import MASK, ROWS, own_experts


def test_a_prompt_that_does_not_fit_leaves_the_cache_as_it_was(engine: CpuEngine) -> None:
    fed(engine, ROWS)
    with pytest.raises(DoesNotFit, match="40 rows of conversation, the cache holds 32"):
        engine.prefill(ROWS, FEATURES, MASK)
    assert engine.num_rows == 20


def test_calls_out_of_order_are_refused(engine: CpuEngine) -> None:
    with pytest.raises(ValueError, match="no row was fed"):
        engine.logits()
    with pytest.raises(ValueError, match="4 features for 5 marked rows"):
        engine.prefill(ROWS, FEATURES[1:], MASK)
    with pytest.raises(ValueError, match=r"features of \(5, 1\): expected 128 values each"):
        engine.prefill(ROWS, FEATURES[:, :1], MASK)
    with pytest.raises(ValueError, match="rows of float64: expected ids"):
        engine.decode_step(ROWS[:1].astype(np.float64))
    with pytest.raises(ValueError, match=r"rows: expected dense int64 \(1, 1, 8\)"):
        engine.decode_step(ROWS[:1, :3])
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


def test_values_that_are_not_finite_or_outside_the_table_are_errors(engine: CpuEngine) -> None:
    features = FEATURES.copy()
    features[2, 3] = np.nan
    with pytest.raises(BackendError, match="NaN or infinite"):
        engine.prefill(ROWS, features, MASK)
    with pytest.raises(BackendError, match="outside its table"):
        engine.decode_step(ROWS[:1] + WIDE.vocabulary.size)


def test_a_bundle_without_native_weights_or_with_others_is_refused(
    bundles: tuple[Bundle, Bundle], library: CpuLibrary, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match="made for experts"):
        CpuEngine(
            bundles[0], context_rows=32, library=library, open_experts=own_experts(bundles[0])
        )
    with pytest.raises(ArtifactError, match=r"native\.bin: no such file"):
        CpuEngine(
            Bundle(tmp_path, bundles[1].manifest),
            context_rows=32,
            library=library,
            open_experts=own_experts(Bundle(tmp_path, bundles[1].manifest)),
        )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", r"arrays\.final_norm\.offset = 1099511627776: expected a multiple of 64, with"),
        ("scales", r"arrays\.table\.scales_offset = 1000000000000000: expected"),
        ("format", "format 2, this runtime reads 1"),
        ("array", r"layers\.1\.qkv is missing"),
    ],
)
def test_damaged_native_weights_are_refused(
    bundle: Bundle, library: CpuLibrary, tmp_path: Path, damage: str, message: str
) -> None:
    for name in ("native.bin", "native.json"):
        shutil.copy(bundle.path / name, tmp_path / name)
    index = json.loads((tmp_path / "native.json").read_text())
    if damage == "cut":
        index["arrays"]["final_norm"]["offset"] = 1 << 40
    elif damage == "scales":
        index["arrays"]["table"]["scales_offset"] = 10**15
    elif damage == "format":
        index["format"] = 2
    else:
        del index["arrays"]["layers.1.qkv"]
    (tmp_path / "native.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=message):
        CpuEngine(
            Bundle(tmp_path, bundle.manifest),
            context_rows=32,
            library=library,
            open_experts=own_experts(Bundle(tmp_path, bundle.manifest)),
        )


def test_a_truncated_expert_file_is_refused(
    bundle: Bundle, library: CpuLibrary, tmp_path: Path
) -> None:
    shutil.copytree(bundle.path, tmp_path, dirs_exist_ok=True)
    with (tmp_path / bundle.manifest.experts.file).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match=r"expert 0 .* expected whole pages within 100 bytes"):
        CpuEngine(
            Bundle(tmp_path, bundle.manifest),
            context_rows=32,
            library=library,
            open_experts=own_experts(Bundle(tmp_path, bundle.manifest)),
        )


@pytest.mark.parametrize(("codebooks", "block"), [(1, 48), (2, 48), (7, 1)])
def test_a_vocabulary_that_is_not_the_tables_is_refused(
    bundle: Bundle, library: CpuLibrary, codebooks: int, block: int
) -> None:
    vocabulary = copy.copy(bundle.manifest.model.vocabulary)
    object.__setattr__(vocabulary, "num_codebooks", codebooks)  # bypasses its checks
    object.__setattr__(vocabulary, "codebook_block", block)
    spec = replace(bundle.manifest.model, vocabulary=vocabulary)
    manifest = dataclasses.replace(bundle.manifest, model=spec)
    with pytest.raises(ArtifactError, match=r"refuse this model: table rows = \d+, expected \d"):
        CpuEngine(
            Bundle(bundle.path, manifest),
            context_rows=32,
            library=library,
            open_experts=own_experts(Bundle(bundle.path, manifest)),
        )


def test_records_larger_than_their_slots_are_refused(bundle: Bundle, library: CpuLibrary) -> None:
    experts = Resident(bundle)
    experts.slot_bytes -= 1
    engine = CpuEngine(bundle, context_rows=32, library=library, open_experts=lambda: experts)
    with pytest.raises(ValueError, match="record_bytes of a table"):
        fed(engine, ROWS)
    engine.close()


def test_a_model_that_the_kernels_do_not_take_is_refused(
    bundle: Bundle, library: CpuLibrary
) -> None:
    spec = bundle.manifest.model
    other = replace(spec, decoder=replace(spec.decoder, num_heads=spec.decoder.num_heads + 1))
    manifest = dataclasses.replace(bundle.manifest, model=other)
    with pytest.raises(
        ArtifactError, match=r"refuse this model: layers\.0\.qkv rows = \d+, expected \d"
    ):
        CpuEngine(
            Bundle(bundle.path, manifest),
            context_rows=32,
            library=library,
            open_experts=own_experts(Bundle(bundle.path, manifest)),
        )


def test_a_missing_library_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        BackendError, match=r"install a C\+\+ compiler .* or choose the backend ort"
    ):
        CpuLibrary(tmp_path / "libdeeptalk_cpu.so")


def test_an_unknown_kernel_path_is_refused(library: CpuLibrary) -> None:
    with pytest.raises(BackendError, match=r"kernel path avx1: this processor runs .*portable"):
        CpuContext(library, path="avx1")


def test_an_unknown_int4_group_is_refused() -> None:
    with pytest.raises(ValueError, match="int4 group of 48"):
        CpuPrecision(matrix_group=48)
