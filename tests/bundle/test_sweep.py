"""No damage to a bundle crashes, hangs or changes an answer without a word.

A part of the sweep runs with all other tests; the whole is slow. `-s` shows the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests.bundle.mutations import (
    Mutation,
    damaged_fields,
    damaged_files,
    resealed_fields,
    resealed_files,
)
from tests.bundle.sweep import Report, sweep
from tests.native.cpu import built

Mutations = Callable[[Path], Iterator[Mutation]]

PART = 47
"""Of the mutations one in so many in the quick tests: a prime, so that every value has its turn."""

SAYS_ITSELF = ("manifest.json: generation.", "manifest.json: model.", "manifest.json: files.native")
"""Fields of a sealed manifest that say how to decode: other content is another bundle."""

backends = pytest.mark.parametrize("backend", ["ort", "cpu"])
whole_or_part = pytest.mark.parametrize(
    "step", [PART, pytest.param(1, marks=pytest.mark.slow, id="whole")]
)


def run(
    bundle: Path,
    mutations: Mutations,
    work: Path,
    *,
    backend: str,
    step: int,
    flags: tuple[str, ...] = (),
    environment: dict[str, str] | None = None,
) -> Report:
    chosen = islice(mutations(bundle), 0, None, step)
    report = sweep(
        bundle,
        chosen,
        work,
        backend=backend,
        library=built.library_place(*flags) if backend == "cpu" else None,
        environment=environment,
    )
    print(f"\n{mutations.__name__} on {backend}, one in {step}: {report}")
    return report


@backends
@whole_or_part
@pytest.mark.parametrize("mutations", [damaged_fields, damaged_files])
def test_damage_is_refused_or_changes_no_answer(
    sweep_bundle: Path, tmp_path: Path, backend: str, step: int, mutations: Mutations
) -> None:
    report = run(sweep_bundle, mutations, tmp_path, backend=backend, step=min(step, 11))
    assert not report.faults
    assert not report.changed
    assert report.counts["refused"] > report.counts["same answer"]


@backends
@whole_or_part
@pytest.mark.parametrize("mutations", [resealed_fields, resealed_files])
def test_a_bundle_made_to_harm_neither_crashes_nor_hangs(
    sweep_bundle: Path, tmp_path: Path, backend: str, step: int, mutations: Mutations
) -> None:
    report = run(sweep_bundle, mutations, tmp_path, backend=backend, step=step)
    assert not report.faults
    if mutations is resealed_fields:
        assert all(name.startswith(SAYS_ITSELF) for name in report.changed), report.changed


@pytest.mark.slow
@pytest.mark.parametrize("mutations", [damaged_fields, resealed_fields, resealed_files])
def test_sanitizers_find_nothing_in_the_kernels(
    sweep_bundle: Path, tmp_path: Path, mutations: Mutations
) -> None:
    # Python and ONNX Runtime are no part of this, and keep what they have to the end.
    environment = {"LD_PRELOAD": built.sanitizer_runtimes(), "ASAN_OPTIONS": "detect_leaks=0"}
    report = run(
        sweep_bundle,
        mutations,
        tmp_path,
        backend="cpu",
        step=1,
        flags=("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        environment=environment,
    )
    assert not report.faults
