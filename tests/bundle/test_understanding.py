"""The files of understanding are written, read, and refused if damaged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deeptalk_edge.bundle.understanding import (
    ARRAYS,
    HEADER,
    Header,
    Understanding,
    read_understanding,
)
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.understanding import Manifold, Score
from tests.model.test_word_head import WORDS, random_head

WIDTH = 6
SCORE = Score(1.0, {"distance": -2.0}, 0.4)


def some() -> Understanding:
    header = Header(
        words=WORDS, questions=("where gate nine", "gate"), before_prefill=SCORE, source="a test"
    )
    values = np.random.default_rng(0)
    basis, _ = np.linalg.qr(values.normal(size=(2 * WIDTH, 2 * WIDTH)))
    manifold = Manifold(
        np.zeros(2 * WIDTH, np.float32), basis[:, :4].astype(np.float32), np.ones(5, np.float32)
    )
    return Understanding(header, random_head(WIDTH), manifold)


def test_a_written_file_reads_back_equal(tmp_path: Path) -> None:
    written = some()
    written.save(tmp_path)
    read = read_understanding(tmp_path, WIDTH)
    assert read is not None
    assert read.head is not None
    assert read.manifold is not None
    assert read.header == written.header
    np.testing.assert_array_equal(read.head.weight, written.head.weight)  # type: ignore[union-attr]
    np.testing.assert_array_equal(read.manifold.basis, written.manifold.basis)  # type: ignore[union-attr]
    assert read.paths() is not None


def test_a_bundle_without_the_files_has_no_understanding(tmp_path: Path) -> None:
    assert read_understanding(tmp_path, WIDTH) is None


def test_without_a_head_scores_of_the_features_remain(tmp_path: Path) -> None:
    Understanding(Header(before_sound=SCORE), None, some().manifold).save(tmp_path)
    read = read_understanding(tmp_path, WIDTH)
    assert read is not None
    assert read.head is None
    assert read.paths() is None
    assert read.header.before_sound == SCORE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": ["gate", "nine"]}, "head_weight is"),
        ({"words": ["two words", "nine", "where"]}, "a word without spaces"),
        ({"questions": ["where exit"]}, "a word that the head does not know"),
        ({"before_prefill": {"bias": 1.0, "weights": {"luck": 1.0}, "least_p": 0.1}}, "luck"),
        ({"before_prefill": {"bias": 1.0, "weights": {}, "least_p": 2.0}}, "0 to 1"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    some().save(tmp_path)
    path = tmp_path / HEADER
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match=message):
        read_understanding(tmp_path, WIDTH)


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    whole = some()
    assert whole.head is not None
    assert whole.manifold is not None
    nan = dataclasses.replace(whole.head, bias=np.full(4, np.nan, np.float32))
    flat = dataclasses.replace(whole.manifold, variances=np.zeros(5, np.float32))
    short = dataclasses.replace(whole.manifold, variances=np.ones(3, np.float32))
    for damaged, message in (
        (dataclasses.replace(whole, head=nan), "not finite"),
        (dataclasses.replace(whole, manifold=flat), "above 0"),
        (dataclasses.replace(whole, manifold=short), "distance_variances"),
    ):
        damaged.save(tmp_path)
        with pytest.raises(ArtifactError, match=message):
            read_understanding(tmp_path, WIDTH)
    whole.save(tmp_path)
    with pytest.raises(ArtifactError, match="head_norm_weight"):
        read_understanding(tmp_path, WIDTH + 1)
    (tmp_path / ARRAYS).write_bytes(b"no archive")
    with pytest.raises(ArtifactError, match="not readable"):
        read_understanding(tmp_path, WIDTH)
