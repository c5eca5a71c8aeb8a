"""The memory of a recipe, computed from the official sizes."""

from __future__ import annotations

import pytest

from deeptalk_edge.checkpoint.config import read_model_spec
from deeptalk_edge.training.plan import Machine, count_parameters, plan_recipe
from deeptalk_edge.training.stages.recipe import read_recipe
from tests.places import OFFICIAL_SIZE

ONE_24_GB = Machine(num_gpus=1, gpu_gb=24, tflops=100)
EIGHT_80_GB = Machine(num_gpus=8, gpu_gb=80, tflops=300)


def test_the_official_size_has_the_published_parameters() -> None:
    """15.557 B in the decoder, 2.511 B of them met by a token (deeptalk's own arithmetic)."""
    counts = count_parameters(read_model_spec(OFFICIAL_SIZE), read_recipe("joint"))
    assert counts.trained / 1e9 == pytest.approx(15.557, abs=0.001)
    assert counts.active / 1e9 == pytest.approx(2.511, abs=0.001)


def test_full_training_fits_eight_large_cards_and_adapters_do_not_fit_one_small_card() -> None:
    whole = [f"checkpoint={OFFICIAL_SIZE}"]
    full = plan_recipe(read_recipe("joint", whole), EIGHT_80_GB, num_rows=600, num_samples=1000)
    assert full.fits
    assert full.optimiser_gb == pytest.approx(8 * 15.557 / 8, rel=0.001)
    lora = [*whole, "lora.rank=8", "data.batch_size=1"]
    small = plan_recipe(read_recipe("joint", lora), ONE_24_GB, num_rows=600, num_samples=None)
    assert not small.fits
    assert small.weights_gb > 24
    said = small.text()
    assert "DOES NOT FIT" in said
    assert "int4" in said
    assert "host memory" in said
    assert "computed" in said
