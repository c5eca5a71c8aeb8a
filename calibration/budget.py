"""Which layers get more bits: a search that meets a budget of bytes.

For every number of layers that may take the largest form, the worst layers take it; then the
upgrade that lowers the summed error most for each byte that it costs is made next, as long as it
fits. Upgrades between int4's groups are 1.5 to 5 % of a layer, so at the official size (9.4 to 16.4
GB) a plan comes within a percent of every budget up to 15.6 GB; of the plans that do, the one of
the least error is taken. Above, fewer than five layers are int4, whose groups no longer bridge the
243 MB from one layer of int8 to the next: up to 1.5 % stay unused.

A layer's error in a form is measured: the squared relative error of its busiest experts' outputs.
Where nothing was measured, as for a model of which only the sizes are known, all layers are alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deeptalk_edge.bundle.expert_record import ExpertForm
from deeptalk_edge.calibration.table import record_form
from deeptalk_edge.errors import DoesNotFit, SettingsError
from deeptalk_edge.model.spec import ModelSpec

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20}
_UNITS |= {"GIB": 2**30}

USUAL_ERRORS = {"int8": 0.006**2, "int4:32": 0.084**2, "int4:64": 0.095**2, "int4:128": 0.105**2}
"""Squared relative errors of round-to-nearest: int8 and int4:32 as the tiny checkpoint's layers
have them, the others by the same rule on normal weights."""

CLOSE = 0.01
"""Of a budget, that may stay unused."""

Errors = Mapping[int, Mapping[ExpertForm, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPlan:
    """What a search found."""

    forms: dict[int, ExpertForm]
    expert_bytes: int
    fixed_bytes: int
    """Everything else of the bundle."""
    budget_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.expert_bytes + self.fixed_bytes

    @property
    def unused_share(self) -> float:
        return 1 - self.total_bytes / self.budget_bytes


def parse_bytes(text: str) -> int:
    """`5.2GB`, `900MiB` or a plain number of bytes.

    Raises SettingsError if it is none.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]{0,3})\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise SettingsError(f"--budget {text!r}: expected a size such as 5.2GB or 900MiB")
    return int(float(found[1]) * unit)


def search(
    spec: ModelSpec,
    forms: Sequence[ExpertForm],
    errors: Errors,
    fixed_bytes: int,
    budget_bytes: int,
) -> BudgetPlan:
    """The precision of every layer's experts.

    Raises DoesNotFit, with the least that does, if the smallest forms exceed the budget.
    """
    layers, num_experts = spec.decoder.moe_layers, spec.decoder.num_experts
    sizes = {form: num_experts * record_form(spec, form).record_bytes for form in forms}
    order = sorted(forms, key=sizes.__getitem__)
    room = budget_bytes - fixed_bytes - len(layers) * sizes[order[0]]
    if room < 0:
        raise DoesNotFit(
            f"--budget {budget_bytes / 1e9:.3f} GB: the smallest bundle, all experts in "
            f"{order[0]}, takes {(budget_bytes - room) / 1e9:.3f} GB, {fixed_bytes / 1e9:.3f} of "
            "it not for routed experts. Experts that do not fit the memory are paged: the "
            "budget is for the disk"
        )
    plans = [
        BudgetPlan(
            forms=forms_now,
            expert_bytes=sum(sizes[form] for form in forms_now.values()),
            fixed_bytes=fixed_bytes,
            budget_bytes=budget_bytes,
        )
        for forms_now in _fillings(layers, order, sizes, errors, room)
    ]
    close = [plan for plan in plans if plan.unused_share < CLOSE] or plans
    return min(close, key=lambda plan: sum(errors[i][form] for i, form in plan.forms.items()))


def _fillings(
    layers: Sequence[int],
    order: Sequence[ExpertForm],
    sizes: Mapping[ExpertForm, int],
    errors: Errors,
    room: int,
) -> Iterator[dict[int, ExpertForm]]:
    """One for each number of layers that take the largest form, the worst first; the others are
    upgraded in small steps as far as the room goes."""
    worst = sorted(layers, key=lambda layer: -errors[layer][order[0]])
    step = sizes[order[-1]] - sizes[order[0]]
    for number in range(len(worst) + 1):
        if number * step > room:
            return
        chosen = dict.fromkeys(layers, order[0]) | dict.fromkeys(worst[:number], order[-1])
        left = room - number * step
        while best := _best_upgrade(chosen, order, sizes, errors, left):
            layer, form = best
            left -= sizes[form] - sizes[chosen[layer]]
            chosen[layer] = form
        yield chosen


def usual_errors(spec: ModelSpec, forms: Sequence[ExpertForm]) -> Errors:
    """All layers alike."""
    known = {form: USUAL_ERRORS[str(form)] for form in forms}
    return dict.fromkeys(spec.decoder.moe_layers, known)


def _best_upgrade(
    chosen: Mapping[int, ExpertForm],
    order: Sequence[ExpertForm],
    sizes: Mapping[ExpertForm, int],
    errors: Errors,
    room: int,
) -> tuple[int, ExpertForm] | None:
    """The layer and larger form that save most error a byte, of those that fit; None if none does
    any good."""
    best, most = None, 0.0
    for layer, form in chosen.items():
        for larger in order[order.index(form) + 1 :]:
            cost = sizes[larger] - sizes[form]
            gain = (errors[layer][form] - errors[layer][larger]) / cost
            if cost <= room and gain > most:
                best, most = (layer, larger), gain
    return best
