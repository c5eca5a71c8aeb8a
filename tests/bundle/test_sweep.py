"""No damage to a bundle causes a crash or a hang or silently changes an answer.

A part of the sweep runs with all other tests; the whole sweep is slow. `-s` shows the numbers.
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
"""The quick tests run every nth mutation: a prime, so that every kind of value is covered."""

SAYS_ITSELF = ("manifest.json: generation.", "manifest.json: model.", "manifest.json: files.native")
"""Decoding settings in a resealed manifest: changing them makes another valid bundle."""

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
    # Leaks are not checked: Python and ONNX Runtime keep memory to the end.
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
