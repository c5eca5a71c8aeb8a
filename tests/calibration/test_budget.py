"""A budget is met from below, within a percent, or refused with the smallest size that works."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeptalk_edge.bundle.expert_record import ExpertForm
from deeptalk_edge.calibration.budget import parse_bytes, search, usual_errors
from deeptalk_edge.calibration.precision import forms_of
from deeptalk_edge.checkpoint.config import read_model_spec
from deeptalk_edge.errors import DoesNotFit, SettingsError
from tests.places import OFFICIAL_SIZE

OFFICIAL = read_model_spec(OFFICIAL_SIZE)
FORMS = forms_of(OFFICIAL)
ERRORS = usual_errors(OFFICIAL, FORMS)
FIXED = 2_000_000_000


@given(st.integers(9_750_000_000, 15_600_000_000))
@settings(deadline=None, max_examples=12)
def test_every_budget_of_the_official_size_is_met_within_a_percent(budget: int) -> None:
    plan = search(OFFICIAL, FORMS, ERRORS, FIXED, budget)
    assert 0 <= plan.unused_share < 0.01
    assert set(plan.forms) == set(OFFICIAL.decoder.moe_layers)


@pytest.mark.parametrize("budget", [15_620_000_000, 15_856_903_758, 16_428_000_000])
def test_with_nearly_all_layers_in_int8_up_to_1_5_percent_of_a_budget_stay_unused(
    budget: int,
) -> None:
    plan = search(OFFICIAL, FORMS, ERRORS, FIXED, budget)
    assert 0.01 <= plan.unused_share < 0.015


def test_the_layer_whose_error_is_worst_gets_its_bits_first() -> None:
    int4, int8 = ExpertForm(dtype="int4", group=32), ExpertForm(dtype="int8")
    errors = {
        layer: {int4: 0.02 if layer == 7 else 0.01, int8: 1e-5}
        for layer in OFFICIAL.decoder.moe_layers
    }
    least = search(OFFICIAL, [int4, int8], errors, 0, 1 << 45)
    assert set(least.forms.values()) == {int8}
    smallest = search(OFFICIAL, [int4], errors, 0, 1 << 45).expert_bytes
    one_more = smallest + (least.expert_bytes - smallest) // 26
    plan = search(OFFICIAL, [int4, int8], errors, 0, one_more)
    assert [layer for layer, form in plan.forms.items() if form == int8] == [7]


def test_a_budget_below_the_smallest_bundle_is_refused_with_that_size() -> None:
    with pytest.raises(DoesNotFit, match=r"takes 9\.\d+ GB"):
        search(OFFICIAL, FORMS, ERRORS, FIXED, 5_200_000_000)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5.2GB", 5_200_000_000), ("900 MiB", 900 * 2**20), ("17", 17), ("3kb", 3000)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5.2XB", "1e9", "0", "nan", "9" * 40])
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="expected a size"):
        parse_bytes(text)
