"""The choice of audio experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.training.expert_split import (
    ExpertLoads,
    adaptive_counts,
    load_split,
    random_split,
    save_split,
    split_experts,
    text_experts,
)
from deeptalk_edge.training.experts import Routing


def _routing(layer: int, ids: list[list[int]]) -> Routing:
    return Routing(
        layer=layer, probabilities=torch.zeros(1, len(ids), 4), expert_ids=torch.tensor([ids])
    )


def test_a_load_is_the_share_of_hits_of_one_modality() -> None:
    loads = ExpertLoads(num_layers=1, num_experts=4)
    audio = torch.tensor([[True, True, False, False]])
    text = torch.tensor([[False, False, True, False]])  # the last row is padding
    loads.count([_routing(1, [[0, 1], [0, 2], [2, 3], [3, 1]])], audio, text)
    audio_loads, text_loads = loads.shares()
    assert audio_loads.tolist() == [[0.5, 0.25, 0.25, 0.0]]
    assert text_loads.tolist() == [[0.0, 0.0, 0.5, 0.5]]


def test_batches_add_up() -> None:
    loads, everywhere = ExpertLoads(num_layers=2, num_experts=4), torch.tensor([[True]])
    for ids in ([[0, 1]], [[0, 2]]):
        layers = [_routing(1, ids), _routing(2, [[2, 3]])]
        loads.count(layers, everywhere, everywhere)
    audio_loads, _ = loads.shares()
    assert audio_loads.tolist() == [[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.5, 0.5]]


def test_a_modality_that_was_never_seen_is_an_error() -> None:
    loads, nowhere = ExpertLoads(num_layers=1, num_experts=4), torch.tensor([[False]])
    loads.count([_routing(1, [[0, 1]])], ~nowhere, nowhere)
    with pytest.raises(ValueError, match="one modality"):
        loads.shares()


def test_an_expert_that_text_uses_more_stays_a_text_expert() -> None:
    """Audio uses expert 0 most, but text uses it even more."""
    audio = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    text = torch.tensor([[0.9, 0.0, 0.0, 0.1]])
    assert split_experts(audio, text, [2], top_k=2) == [[1, 2]]


def test_layers_may_have_different_counts() -> None:
    audio = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0], [0.0, 0.1, 0.2, 0.3, 0.4]])
    split = split_experts(audio, torch.zeros(2, 5), [2, 3], top_k=2)
    assert split == [[0, 1], [2, 3, 4]]
    assert text_experts(split, 5) == [[2, 3, 4], [0, 1]]


@pytest.mark.parametrize("count", [1, 3])
def test_both_modalities_keep_at_least_top_k_experts(count: int) -> None:
    with pytest.raises(ValueError, match="top_k"):
        split_experts(torch.zeros(1, 4), torch.zeros(1, 4), [count], top_k=2)


def test_the_file_is_a_list_of_lists(tmp_path: Path) -> None:
    save_split([[0, 2], [1]], tmp_path / "audio_experts.json")
    assert json.loads((tmp_path / "audio_experts.json").read_text()) == [[0, 2], [1]]
    assert len(list(tmp_path.iterdir())) == 1


def test_mass_counts_probability_where_hits_count_picks() -> None:
    routing = Routing(
        layer=1,
        probabilities=torch.tensor([[[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]]]),
        expert_ids=torch.tensor([[[0, 1], [3, 2]]]),
    )
    everywhere = torch.tensor([[True, True]])
    loads = ExpertLoads(1, 4, "mass")
    loads.count([routing], everywhere, everywhere)
    audio, _ = loads.shares()
    assert audio[0].tolist() == pytest.approx([0.3, 0.25, 0.25, 0.2])


def test_the_adaptive_count_is_what_audio_uses_more_than_text() -> None:
    audio = torch.tensor([[0.5, 0.3, 0.1, 0.1, 0.0], [0.9, 0.1, 0.0, 0.0, 0.0]])
    text = torch.tensor([[0.1, 0.1, 0.0, 0.4, 0.4], [0.0, 0.2, 0.2, 0.3, 0.3]])
    assert adaptive_counts(audio, text, top_k=1) == [3, 1]
    assert adaptive_counts(audio, text, top_k=2) == [3, 2]


def test_a_random_split_depends_only_on_the_seed() -> None:
    split = random_split(3, 8, 4, seed=5)
    assert split == random_split(3, 8, 4, seed=5) != random_split(3, 8, 4, seed=6)
    assert all(len(set(layer)) == 4 for layer in split)


@pytest.mark.parametrize("content", ["{}", "[1]", "[[-1]]", "[[true]]", '[["0"]]'])
def test_a_file_that_is_not_a_split_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(SettingsError, match="list of lists"):
        load_split(tmp_path / "split.json")
