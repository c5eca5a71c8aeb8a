"""Inputs of the CPU engine's tests, and comparisons of the outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from deeptalk_edge.bundle.expert_record import ExpertDtype
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.runtime.lm.engine import Engine, Logits
from deeptalk_edge.training.checkpoint import config_of, save_checkpoint
from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.snac_files import save_snac
from tests.runtime.backends.kernel_bundles import write_bundles
from tests.runtime.fed import features_of, written
from tests.runtime.speaking_checkpoint import CODEC, SPEC, byte_level_tokenizer
from tests.training.random_models import random_model

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

FEATURES = features_of(WIDE.decoder.width)


def random_checkpoint(spec: ModelSpec, place: Path) -> Path:
    save_checkpoint(place, random_model(spec), config_of(spec))
    save_snac(Snac(CODEC), place / "snac")
    byte_level_tokenizer().save(str(place / "tokenizer.json"))
    return place


def random_bundles(spec: ModelSpec, place: Path, dtype: ExpertDtype) -> tuple[Bundle, Bundle]:
    source = random_checkpoint(spec, place / "source")
    return write_bundles(source, place, dtype=dtype, group=64 if dtype == "int4" else None)


def fed(engine: Engine, rows: Ids) -> Logits:
    """The logits of rows that are fed to a new engine."""
    return written(engine, rows, WIDE.decoder.width)


def assert_equal(found: Logits, expected: Logits) -> None:
    np.testing.assert_array_equal(found.text, expected.text)
    np.testing.assert_array_equal(found.codes, expected.codes)
