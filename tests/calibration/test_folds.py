"""Folded scales do not change the function; scales that would are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.calibration.folds import FoldedCheckpoint, Folds
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.export.verify.reference import Reference
from tests.export.checkpoints import write_checkpoint
from tests.specs import PLAIN

SPEC = PLAIN.decoder


def some_folds(seed: int = 0) -> Folds:
    rng = np.random.default_rng(seed)

    def scales(*shape: int) -> np.ndarray:
        return np.exp(rng.uniform(-1.5, 1.5, shape)).astype(np.float32)

    return Folds(
        inputs={layer: scales(SPEC.width) for layer in SPEC.moe_layers},
        hidden={
            layer: scales(SPEC.num_experts, SPEC.expert_ffn_width) for layer in SPEC.moe_layers
        },
        latents={layer: scales(SPEC.latent_dim) for layer in range(SPEC.num_layers)},
    )


def test_a_folded_checkpoint_is_the_same_function(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint").place)
    x = np.random.default_rng(1).standard_normal((9, SPEC.width)).astype(np.float32)
    expected = Reference(checkpoint).decode(x)
    folded = FoldedCheckpoint(checkpoint, some_folds())
    found = Reference(folded).decode(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    name = f"model.layers.{SPEC.num_dense_layers}.mlp.experts.0.up_proj.weight"
    assert np.abs(folded.tensor(name) - checkpoint.tensor(name)).max() > 1e-3  # it did fold


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_not_above_zero_and_finite_is_refused(bad: float) -> None:
    scales = np.ones(SPEC.width, np.float32)
    scales[3] = bad
    with pytest.raises(ArtifactError, match="finite numbers above zero"):
        Folds(inputs={1: scales}).check(SPEC)


def test_scales_of_another_shape_or_layer_are_refused() -> None:
    with pytest.raises(ArtifactError, match="expected"):
        Folds(inputs={1: np.ones(3, np.float32)}).check(SPEC)
    with pytest.raises(ArtifactError, match="layer 0"):
        Folds(inputs={0: np.ones(SPEC.width, np.float32)}).check(SPEC)  # a dense layer


def test_a_fitted_router_replaces_the_checkpoints_before_the_scales(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "checkpoint").place)
    layer, scales = SPEC.num_dense_layers, some_folds()
    router = np.full((SPEC.num_experts, SPEC.width), -2.0, np.float32)
    name = f"model.layers.{layer}.mlp.gate.weight"
    alone = FoldedCheckpoint(checkpoint, Folds(routers={layer: router}))
    np.testing.assert_array_equal(alone.tensor(name), router)
    both = FoldedCheckpoint(checkpoint, replace(scales, routers={layer: router}))
    np.testing.assert_array_equal(both.tensor(name), router * scales.inputs[layer])
    other = f"model.layers.{layer + 1}.mlp.gate.weight"
    np.testing.assert_array_equal(alone.tensor(other), checkpoint.tensor(other))
    router[1, 2] = np.nan
    with pytest.raises(ArtifactError, match=f"folded routers of layer {layer}: expected finite"):
        Folds(routers={layer: router}).check(SPEC)
