"""DPO: its losses by hand, its two forms, and the choice of pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from deeptalk_edge.training.answering import Said
from deeptalk_edge.training.items import Batch
from deeptalk_edge.training.losses import (
    IGNORE,
    code_log_probabilities,
    preference_losses,
)
from deeptalk_edge.training.preference import Scored, can_be_paired, pick
from deeptalk_edge.training.stages.objective import PreferenceBatch, _aligned_to_the_end


def test_the_log_probability_of_codes_is_a_sum_over_what_is_asked() -> None:
    logits = torch.zeros(1, 3, 2, 4)
    targets = torch.tensor([[[1, IGNORE], [2, 3], [IGNORE, IGNORE]]])
    found = code_log_probabilities(logits, targets)
    assert found.tolist()[0] == pytest.approx([2 * -math.log(4), -math.log(4)])


def test_equal_models_cost_log_two_and_a_margin_costs_less() -> None:
    one = torch.tensor([[-3.0, -5.0]])
    even = preference_losses(one, one - 1, one, one - 1, beta=0.1)
    assert even.tolist() == pytest.approx([math.log(2)] * 2)
    better = preference_losses(one + 10, one - 1, one, one - 1, beta=0.1)
    assert better.tolist() == pytest.approx([-math.log(1 / (1 + math.exp(-1.0)))] * 2)


def test_the_released_form_aligns_both_answers_at_their_ends() -> None:
    """One codebook; the better answer has rows 2 to 5, the worse one rows 2 to 3, then 2 to 7."""
    short, long = _batch([7, 8]), _batch([1, 2, 3, 4, 5, 6])
    win = _batch([1, 1, 1, 1])
    assert _codes(win, short) == [IGNORE] * 4 + [7, 8, IGNORE, IGNORE]
    assert _codes(win, long) == [IGNORE, IGNORE, 3, 4, 5, 6, IGNORE, IGNORE]


def _codes(win: Batch, lose: Batch) -> list[int]:
    found: list[int] = _aligned_to_the_end(PreferenceBatch(win=win, lose=lose))[0, :, 0].tolist()
    return found


def _batch(codes: list[int]) -> Batch:
    targets = torch.full((1, 8, 2), IGNORE)
    targets[0, 2 : 2 + len(codes), 0] = torch.tensor(codes)
    nothing = torch.zeros(1, 8, dtype=torch.int64)
    return Batch(rows=targets, targets=targets, frames=nothing - 1, live=nothing == 0)


def _said(text: str = "gate one", num_frames: int = 3) -> Said:
    return Said(text=text, word_frames=(1, 2), frames=np.zeros((num_frames, 7), np.int64))


def test_the_best_and_the_worst_answer_make_a_pair() -> None:
    answers = [Scored(said=_said(), word_error_rate=rate) for rate in (0.5, 0.0, 1.0)]
    assert pick(answers) == (answers[1], answers[2])


def test_answers_that_are_equally_good_make_no_pair() -> None:
    alone = Scored(said=_said(), word_error_rate=0.0)
    assert pick([alone, alone]) is None
    assert pick([alone]) is None
    assert pick([]) is None


def test_only_the_requested_text_in_speech_of_a_fitting_length_can_be_paired() -> None:
    assert can_be_paired(_said(), "Gate one.")
    assert not can_be_paired(_said("gate two"), "gate one")
    assert not can_be_paired(_said(num_frames=0), "gate one")
    assert not can_be_paired(_said(num_frames=143), "gate one"), "longer than the loader takes"
    late = Said(text="gate one", word_frames=(1, 6), frames=np.zeros((3, 7), np.int64))
    assert not can_be_paired(late, "gate one"), "the speech ends before the text"
