"""The precision of each layer's experts: the profile's own, or a search within a budget."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from deeptalk_edge.bundle.expert_record import INT4_GROUPS, ExpertForm
from deeptalk_edge.calibration.budget import search
from deeptalk_edge.calibration.layer import LayerTask
from deeptalk_edge.calibration.observe import Observation
from deeptalk_edge.calibration.table import record_form
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.devices.profile import DeviceProfile
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.spec import ModelSpec

log = logging.getLogger(__name__)


def chosen_forms(spec: ModelSpec, profile: DeviceProfile) -> dict[int, ExpertForm]:
    """The profile's precision for every layer; of int4 the largest group that fits the widths.

    Raises SettingsError if the profile's experts are not int8 or int4.
    """
    precision = profile.precision
    if precision.experts not in ("int8", "int4"):
        raise SettingsError(
            f"device {profile.name}: experts in {precision.experts} need no calibration; name "
            "--precision experts=int8 or experts=int4:32"
        )
    form = ExpertForm(dtype=precision.experts, group=precision.expert_group)
    if form.group and form not in forms_of(spec):
        fitting = [f for f in forms_of(spec) if f.group and f.group <= form.group]
        if not fitting:
            raise SettingsError(f"the experts' widths are no whole groups of {INT4_GROUPS}")
        smaller = max(fitting, key=lambda f: f.group or 0)
        log.warning("int4 experts in groups of %s: %s fits no width", smaller.group, form.group)
        form = dataclasses.replace(form, group=smaller.group)
    return dict.fromkeys(spec.decoder.moe_layers, form)


def forms_within(
    checkpoint: Checkpoint,
    audio_experts: Sequence[Sequence[int]],
    seen: Observation,
    *,
    fixed_bytes: int,
    budget_bytes: int,
    threshold: int,
) -> dict[int, ExpertForm]:
    """What the budget's search finds, with the errors of each layer measured on its tokens.

    Raises DoesNotFit if the smallest forms exceed the budget.
    """
    spec = checkpoint.spec
    forms = forms_of(spec)
    records = [record_form(spec, form) for form in forms]
    errors = {}
    for layer, tokens in seen.tokens.items():
        task = LayerTask(checkpoint, layer, tokens, audio_experts, threshold=threshold)
        errors[layer] = dict(zip(forms, task.errors(records), strict=True))
    plan = search(spec, forms, errors, fixed_bytes, budget_bytes)
    if plan.unused_share > 0.01:
        log.warning(
            "--budget: %.1f %% of it is unused: %s",
            100 * plan.unused_share,
            "all experts are in int8"
            if all(form.dtype == "int8" for form in plan.forms.values())
            else "a layer's next step is larger than what is left",
        )
    return plan.forms


def forms_of(spec: ModelSpec) -> list[ExpertForm]:
    """Every form that the model's experts can take, smallest first."""
    sizes = spec.decoder.width, spec.decoder.expert_ffn_width
    groups = [g for g in INT4_GROUPS if not any(size % g for size in sizes)]
    forms = [ExpertForm(dtype="int4", group=group) for group in sorted(groups, reverse=True)]
    return [*forms, ExpertForm(dtype="int8")]
