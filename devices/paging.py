"""The `[paging]` table of a device profile: what a simulated replay of routes needs to know.

    [paging]
    source = "estimated from memory bandwidth, see docs/paging.md"
    pool_bytes = 3_200_000_000
    link = "disk"                    # disk, or pcie: the experts lie in host memory
    link_gb_per_s = [1.0, 2.0, 3.0]  # the last is the usual one
    attention_ms = 0.40              # a layer and decode step
    fixed_ms = 6.5                   # a step: dense layer, heads, sampling
    prefill_row_ms = 0.031           # a row and layer

    [paging.experts.int4]
    record_bytes = 4_595_712
    decode_ms = 0.65                 # a layer and decode step, all of its experts resident
    prefill_ms = 0.070               # an expert of a layer's union

Every figure is an unconfirmed estimate, so the table has no `confirmed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from deeptalk_edge.devices.tables import fields, positive

Link = Literal["disk", "pcie"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertEstimates:
    """One precision of the experts."""

    record_bytes: int
    decode_ms: float
    prefill_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PagingEstimates:
    """All of the table."""

    source: str
    pool_bytes: int
    link: Link
    link_gb_per_s: tuple[float, ...]
    attention_ms: float
    fixed_ms: float
    prefill_row_ms: float
    experts: Mapping[str, ExpertEstimates]
    """By precision."""


def parse_paging(content: Mapping[str, Any]) -> PagingEstimates:
    """Raises ValueError if a key is unknown or missing, or a value is wrong."""
    table = fields(PagingEstimates, content, "paging")
    if not isinstance(table["source"], str) or not table["source"].strip():
        raise ValueError(f"paging.source is {table['source']!r}: say where the estimates come from")
    if table["link"] not in get_args(Link):
        raise ValueError(f"paging.link is {table['link']!r}, expected disk or pcie")
    rates, experts = table["link_gb_per_s"], table["experts"]
    if not isinstance(rates, list) or not rates:
        raise ValueError(f"paging.link_gb_per_s is {rates!r}, expected a list of rates")
    if not isinstance(experts, dict) or not experts:
        raise ValueError("paging.experts: expected a table for at least one precision")
    table["link_gb_per_s"] = tuple(positive("paging.link_gb_per_s", float, rate) for rate in rates)
    table["experts"] = {name: _experts(name, experts) for name in experts}
    for name in ("attention_ms", "fixed_ms", "prefill_row_ms"):
        table[name] = positive(f"paging.{name}", float, table[name])
    table["pool_bytes"] = positive("paging.pool_bytes", int, table["pool_bytes"])
    return PagingEstimates(**table)


def _experts(name: str, content: Mapping[str, Any]) -> ExpertEstimates:
    table, place = fields(ExpertEstimates, content, name), f"paging.experts.{name}"
    kinds = {"record_bytes": int, "decode_ms": float, "prefill_ms": float}
    return ExpertEstimates(
        **{key: positive(f"{place}.{key}", kind, table[key]) for key, kind in kinds.items()}
    )
