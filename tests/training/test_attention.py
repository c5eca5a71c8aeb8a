"""Arguments of a card's fused attention; test_model.py compares its results with ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deeptalk_edge.training import attention


@pytest.mark.parametrize(
    ("num_rows", "is_causal", "asked"),
    [(5, True, (None, True)), (3, True, ((3, 5), False)), (5, False, (None, False))],
)
def test_fused_attention_masks_by_itself_only_where_all_rows_are_queries(
    num_rows: int,
    is_causal: bool,
    asked: tuple[tuple[int, ...] | None, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the meta device, which has shapes and computes no numbers."""
    calls: list[tuple[Any, Any]] = []

    def fused(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        calls.append((None if attn_mask is None else tuple(attn_mask.shape), is_causal))
        assert scale == 0.25
        return query

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    query = torch.empty(1, 2, num_rows, 8, device="meta")
    keys = torch.empty(1, 2, 5, 8, device="meta")
    attention.dot_product_attention(query, keys, keys, 0.25, is_causal=is_causal)
    assert calls == [asked]
