"""Experts that are added to those of a model."""

from __future__ import annotations

import pytest
import torch

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.training.experts import MixtureOfExperts
from deeptalk_edge.training.moextend import added_experts, with_audio_experts
from tests.specs import PLAIN
from tests.training.random_models import random_model, random_rows


def test_added_experts_are_copies_and_the_others_stay() -> None:
    model = random_model(PLAIN)
    extended = with_audio_experts(model, 2)
    old, new = (m.model.layers[1].mlp for m in (model, extended))
    assert isinstance(old, MixtureOfExperts)
    assert isinstance(new, MixtureOfExperts)
    assert len(new.experts) == 7
    for place, source in ((0, 0), (4, 4), (5, 0), (6, 2)):
        for name, weight in old.experts[source].state_dict().items():
            assert torch.equal(weight, new.experts[place].state_dict()[name])
        assert torch.equal(old.gate.weight[source], new.gate.weight[place])


def test_a_model_without_its_added_experts_equals_the_original() -> None:
    model = random_model(PLAIN)
    extended = with_audio_experts(model, 2).eval()
    added = added_experts(extended.spec.decoder, 2)
    assert added == [[5, 6], [5, 6]]
    extended.set_barred_experts(added)
    rows = random_rows(PLAIN, 2, 6)
    torch.testing.assert_close(extended(rows), model(rows))


@pytest.mark.parametrize("count", [1, 6])
def test_a_number_that_does_not_fit_is_refused(count: int) -> None:
    with pytest.raises(SettingsError, match="expected 2 to 5"):
        with_audio_experts(random_model(PLAIN), count)
