"""The precision of a layer's experts is the profile's, in groups that divide the model's widths."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deeptalk_edge.calibration.precision import chosen_forms
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.errors import SettingsError
from tests.specs import DECODER, PLAIN

PROFILE = load_profile("cpu-int8")


@pytest.mark.parametrize(
    ("width", "wanted", "group"), [(128, 64, 64), (64, 128, 64), (96, 128, 32), (32, 32, 32)]
)
def test_groups_are_the_largest_that_divide_both_widths(
    width: int, wanted: int, group: int
) -> None:
    spec = replace(PLAIN, decoder=replace(DECODER, width=width, expert_ffn_width=2 * width))
    forms = chosen_forms(spec, PROFILE.with_precision([f"experts=int4:{wanted}"]))
    assert list(forms) == list(spec.decoder.moe_layers)
    assert {(form.dtype, form.group) for form in forms.values()} == {("int4", group)}


def test_widths_without_whole_groups_and_experts_in_float_are_refused() -> None:
    with pytest.raises(SettingsError, match="no whole groups"):
        chosen_forms(PLAIN, PROFILE.with_precision(["experts=int4:32"]))
    with pytest.raises(SettingsError, match="float32 need no calibration"):
        chosen_forms(PLAIN, load_profile("cpu"))
