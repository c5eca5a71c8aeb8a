"""The losses against numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from deeptalk_edge.training.experts import Routing
from deeptalk_edge.training.losses import IGNORE, OFFICIAL_WEIGHTS, balance_loss, token_losses

V_TEXT, K, V_CODE = 10, 7, 6
LIVE = torch.ones(1, 2, dtype=torch.bool)


def token_loss(
    text_logits: torch.Tensor,
    code_logits: torch.Tensor,
    targets: torch.Tensor,
    weights: Sequence[float] = OFFICIAL_WEIGHTS,
) -> torch.Tensor:
    return torch.stack(
        list(token_losses(text_logits, code_logits, targets, weights).values())
    ).sum()


def _logits(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform: every labelled position costs log(classes)."""
    return torch.zeros(num_rows, V_TEXT), torch.zeros(num_rows, K, V_CODE)


def _targets(num_rows: int) -> torch.Tensor:
    return torch.full((num_rows, K + 1), IGNORE)


def test_a_batch_without_speech_is_divided_by_two() -> None:
    targets = _targets(3)
    targets[:, -1] = 1
    loss = token_loss(*_logits(3), targets)
    assert loss.item() == pytest.approx(math.log(V_TEXT) / 2)


def test_a_batch_with_speech_is_divided_by_eight() -> None:
    loss = token_loss(*_logits(3), torch.ones_like(_targets(3)))
    assert loss.item() == pytest.approx((math.log(V_TEXT) + K * math.log(V_CODE)) / 8)


def test_each_stream_is_a_mean_over_its_own_labels() -> None:
    text_logits, code_logits = _logits(4)
    text_logits[0, 1] = 50.0  # row 0 is certain and right, and the only one with a text label
    targets = _targets(4)
    targets[0, -1] = 1
    targets[2, 0] = 3
    loss = token_loss(text_logits, code_logits, targets)
    assert loss.item() == pytest.approx((0.0 + math.log(V_CODE)) / 3, abs=1e-6)


def test_ignored_positions_have_no_gradient() -> None:
    text_logits, code_logits = (logits.requires_grad_() for logits in _logits(2))
    targets = _targets(2)
    targets[0] = 1
    torch.autograd.backward(token_loss(text_logits, code_logits, targets))
    assert text_logits.grad is not None
    assert code_logits.grad is not None
    assert (text_logits.grad[0] != 0).any()
    assert (text_logits.grad[1] == 0).all()
    assert (code_logits.grad[1] == 0).all()


def test_weights_scale_their_own_stream() -> None:
    targets = torch.ones_like(_targets(2))
    loss = token_loss(*_logits(2), targets, (4.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0))
    assert loss.item() == pytest.approx((4 * math.log(V_TEXT) + 2 * math.log(V_CODE)) / 8)


def test_speech_alone_has_a_text_term_of_zero() -> None:
    targets = torch.ones_like(_targets(2))
    targets[:, -1] = IGNORE
    assert token_loss(*_logits(2), targets).item() == pytest.approx(K * math.log(V_CODE) / 8)


def _routing(ids: list[list[int]], probabilities: list[list[float]]) -> Routing:
    return Routing(
        layer=1,
        probabilities=torch.tensor([probabilities], requires_grad=True),
        expert_ids=torch.tensor([ids]),
    )


def test_even_routing_costs_the_weight_and_uneven_routing_more() -> None:
    even = _routing([[0, 1], [2, 3]], [[0.25] * 4] * 2)
    uneven = _routing([[0, 1], [0, 1]], [[0.5, 0.5, 0.0, 0.0]] * 2)
    assert balance_loss([even], LIVE, 0.001).item() == pytest.approx(0.001)
    assert balance_loss([uneven], LIVE, 0.001).item() == pytest.approx(0.002)
    assert balance_loss([even, uneven], LIVE, 0.001).item() == pytest.approx(0.003)


def test_the_balance_is_kept_within_each_sequence() -> None:
    """Two sequences that each use one half of the experts are not balanced by one another."""
    both = Routing(
        layer=1,
        probabilities=torch.tensor([[[0.5, 0.5, 0.0, 0.0]], [[0.0, 0.0, 0.5, 0.5]]]),
        expert_ids=torch.tensor([[[0, 1]], [[2, 3]]]),
    )
    assert balance_loss([both], LIVE[:, :1].expand(2, 1), 1.0).item() == pytest.approx(2.0)


def test_padding_does_not_count_in_the_balance() -> None:
    """By hand: rows 0 and 1 are live, the third would change every number below.

    Picks 0, 1, 0, 2 of E = 4, top_k = 2, S = 2: shares (2, 1, 1, 0) * 4 / 4; mass is the mean of
    the two live rows (0.5, 0.2, 0.2, 0.1): 2 * 0.5 + 0.2 + 0.2 = 1.4.
    """
    routing = _routing(
        [[0, 1], [0, 2], [3, 2]],
        [[0.6, 0.2, 0.1, 0.1], [0.4, 0.2, 0.3, 0.1], [0.0, 0.0, 0.1, 0.9]],
    )
    live = torch.tensor([[True, True, False]])
    assert balance_loss([routing], live, 1.0).item() == pytest.approx(1.4)
    loss = balance_loss([routing], live, 1.0)
    torch.autograd.backward(loss)
    assert routing.probabilities.grad is not None
    assert (routing.probabilities.grad[0, 2] == 0).all()
