"""The nearest option that works, for a device that refuses: the fewest changes, cheapest first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from deeptalk_edge.devices.plan.device import Model, near_window, plan_device
from deeptalk_edge.devices.plan.times import Question
from deeptalk_edge.devices.profile import DeviceProfile
from deeptalk_edge.errors import SettingsError

_CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("one item (--items 1)", {"items": 1}),
    ("experts paged", {"residency": "paged"}),
    ("--precision experts=int8", {"precision": ["experts=int8"]}),
    ("--precision experts=int4:128", {"precision": ["experts=int4:128"]}),
    ("--context 1024", {"context": 1024}),
    ("--precision decoder=int8", {"precision": ["decoder=int8"]}),
    ("--encoder-window near", {"near": True}),
)
"""In the order of what they cost the listener."""


def nearest_option(
    model: Model, profile: DeviceProfile, question: Question, power_mode: str | None
) -> str | None:
    """The fewest changes, cheapest first, after which the device fits or pages in real time."""
    for chosen in _combinations():
        try:
            changed, asked, changed_profile = _changed(model, profile, question, chosen)
            plan = plan_device(
                changed, changed_profile, asked, power_mode=power_mode, look_for_options=False
            )
        except (SettingsError, ValueError):
            continue
        if plan.verdict in ("fits", "pages"):
            return " ".join(name for name, _ in chosen) + f": {plan.verdict}, {plan.reason}"
    return None


def _combinations() -> Iterator[tuple[tuple[str, dict[str, Any]], ...]]:
    for size in range(1, len(_CHANGES) + 1):
        for chosen in itertools.combinations(_CHANGES, size):
            if sum("experts=" in name for name, _ in chosen) < 2:
                yield chosen


def _changed(
    model: Model,
    profile: DeviceProfile,
    question: Question,
    chosen: tuple[tuple[str, dict[str, Any]], ...],
) -> tuple[Model, Question, DeviceProfile]:
    for _, change in chosen:
        if "items" in change:
            question = dataclasses.replace(question, num_items=change["items"])
        if "context" in change:
            rows = min(change["context"], model.context_rows)
            model = dataclasses.replace(model, context_rows=rows)
        if "near" in change:
            question = near_window(question, model.spec)
        if "residency" in change:
            profile = dataclasses.replace(profile, expert_residency=change["residency"])
        profile = profile.with_precision(change.get("precision", []))
    return model, question, profile
