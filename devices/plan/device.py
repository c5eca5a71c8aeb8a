"""One model on one device: memory, times, a verdict, and the nearest option that works."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from deeptalk_edge.devices.facts import DeviceFacts, Fact, PowerMode
from deeptalk_edge.devices.plan.memory import (
    MemoryPlan,
    fitted_profile,
    memory_plan,
    record_format,
)
from deeptalk_edge.devices.plan.shapes import WeightShapes
from deeptalk_edge.devices.plan.times import (
    FLOOR,
    FRAME_MS,
    Assumptions,
    Question,
    Rates,
    Times,
    times,
)
from deeptalk_edge.devices.plan.work import ModelWork
from deeptalk_edge.devices.profile import DeviceProfile
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.spec import CodecSpec, ModelSpec

Verdict = Literal["fits", "pages", "refuses", "unknown"]
"""All experts stay in memory; some are read while it talks; it cannot run, or not in real time;
the profile does not say enough."""

MEASURED = Assumptions(
    step_efficiency=1.0, product_efficiency=1.0, prefill_memory_efficiency=1.0, reads_hide=False
)
"""For rates that `probe` measured with our own kernels: they are what is reached, not a peak.
docs/measurements/forecast.md shows how far off they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is planned for: a checkpoint's or a bundle's sizes."""

    spec: ModelSpec
    codec: CodecSpec
    context_rows: int = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """`dataclasses.asdict` is ready for JSON. Every time in it is computed."""

    device: str
    summary: str
    power_mode: str | None
    backend: str
    precision: Mapping[str, str]
    context_rows: int
    num_items: int
    question_s: float
    encoder_window: str
    memory: MemoryPlan
    floor: Times | None
    expected: Times | None
    why_no_times: str | None
    """What the profile lacks."""
    assumptions: Assumptions
    verdict: Verdict
    reason: str
    nearest: str | None
    """The smallest change that works, of a device that refuses."""
    unconfirmed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By group of figures, its unconfirmed facts."""


def plan_device(
    model: Model,
    profile: DeviceProfile,
    question: Question,
    *,
    power_mode: str | None = None,
    hangover_ms: float | None = None,
    look_for_options: bool = True,
) -> DevicePlan:
    """Plan one device, in a power mode or in its best one.

    Raises SettingsError if the device has no such mode, or cannot store the experts.
    """
    profile = fitted_profile(profile, model.spec)
    mode = _mode(profile, power_mode)
    records = record_format(model.spec, profile)
    shapes = WeightShapes.of(model.spec, model.codec, with_noise=False)
    memory = memory_plan(model.spec, profile, shapes, records, model.context_rows)
    work = ModelWork.of(
        model.spec,
        model.codec,
        profile.precision,
        records,
        keeps_last_row=profile.backend == "cpu",
    )
    assumptions = MEASURED if is_measured(profile) else Assumptions()
    floor_assumptions = dataclasses.replace(
        FLOOR, product_efficiency=max(FLOOR.product_efficiency, assumptions.product_efficiency)
    )
    if hangover_ms is not None:
        assumptions = dataclasses.replace(assumptions, hangover_ms=hangover_ms)
        floor_assumptions = dataclasses.replace(floor_assumptions, hangover_ms=hangover_ms)
    rates, why_no_times = rates_of(profile, mode)
    expected = floor = None
    if rates is not None and memory.resident_share is not None:
        expected = times(work, rates, question, memory.resident_share, assumptions)
        floor = times(work, rates, question, 1.0, floor_assumptions)
    elif rates is not None:
        why_no_times = "the profile states no usable_memory_bytes; run `deeptalk-edge probe` on it"
    verdict, reason = _verdict(memory, expected, profile, rates, question.num_items)
    nearest = None
    if verdict == "refuses" and look_for_options:
        from deeptalk_edge.devices.plan.options import nearest_option  # which plans again

        nearest = nearest_option(model, profile, question, power_mode)
    return DevicePlan(
        device=profile.name,
        summary=profile.summary,
        power_mode=mode.name if mode else None,
        backend=profile.backend,
        precision=profile.precision.spelled(),
        context_rows=model.context_rows,
        num_items=question.num_items,
        question_s=question.seconds,
        encoder_window="near" if question.encoder_frames else "whole",
        memory=memory,
        floor=floor,
        expected=expected,
        why_no_times=why_no_times,
        assumptions=assumptions,
        verdict=verdict,
        reason=reason,
        nearest=nearest,
        unconfirmed=_unconfirmed(profile, mode, pages=(memory.resident_share or 1) < 1),
    )


def is_measured(profile: DeviceProfile) -> bool:
    """Its memory's rate comes from `probe`."""
    fact = profile.facts.memory_bandwidth_gb_per_s
    return fact is not None and fact.measured is not None


def rates_of(profile: DeviceProfile, mode: PowerMode | None) -> tuple[Rates | None, str | None]:
    """What the profile says of speed, or what it lacks."""
    facts = profile.facts
    if facts.compute_capabilities and not profile.has_engines and not is_measured(profile):
        return None, (
            "the profile's rates are those of its GPU, and this would run on its CPU; run "
            "`deeptalk-edge probe` on the device"
        )
    product_name, encoder_name = _RATES[profile.backend]
    product, encoder = getattr(facts, product_name), getattr(facts, encoder_name)
    needed = {
        "memory_bandwidth_gb_per_s": facts.memory_bandwidth_gb_per_s,
        product_name: product,
    }
    if missing := [name for name, fact in needed.items() if fact is None]:
        return None, (
            f"the profile states no {' or '.join(missing)}; run `deeptalk-edge probe` on the device"
        )
    memory_fact, link = facts.memory_bandwidth_gb_per_s, link_of(facts)
    activations = facts.activations_g_per_s if profile.backend == "cpu" else None
    assert memory_fact is not None
    assert product is not None
    memory = memory_fact.value
    if mode is not None and mode.memory_bandwidth_gb_per_s is not None:
        memory = mode.memory_bandwidth_gb_per_s
    return (
        Rates(
            memory_gb_per_s=memory,
            product_tops=product.value,
            encoder_tops=encoder.value if encoder else None,
            link_gb_per_s=link[1].value if link else None,
            activations_g_per_s=activations.value if activations else None,
        ),
        None,
    )


_RATES = {
    "ort": ("float32_tflops", "float32_tflops"),
    "cpu": ("int8_tops", "float32_tflops"),
    "tensorrt_rtx": ("float16_tflops", "float16_tflops"),
    "tensorrt": ("float16_tflops", "float16_tflops"),
}
"""By backend the facts that say how fast decoder, and encoder and codec, multiply."""


def link_of(facts: DeviceFacts) -> tuple[str, Fact[float]] | None:
    """Where experts that are not in memory come from: host memory over PCIe, or the disk."""
    for name in ("host_link_gb_per_s", "disk_read_gb_per_s"):
        if (fact := getattr(facts, name)) is not None:
            return name, fact
    return None


def _mode(profile: DeviceProfile, name: str | None) -> PowerMode | None:
    if name is None:
        return None
    for mode in profile.power_modes:
        if mode.name == name:
            return mode
    known = ", ".join(mode.name for mode in profile.power_modes) or "none"
    raise SettingsError(f"device {profile.name}: no power mode {name!r}; its modes: {known}")


def _verdict(
    memory: MemoryPlan,
    expected: Times | None,
    profile: DeviceProfile,
    rates: Rates | None,
    num_items: int,
) -> tuple[Verdict, str]:
    if memory.usable is None or memory.slots is None:
        return "unknown", "the profile states no usable_memory_bytes"
    if not memory.fits:
        short_gb = (memory.needed_bytes - memory.usable.value) / 1e9
        return "refuses", f"{short_gb:.2f} GB of memory short"
    is_whole = memory.slots == memory.num_experts
    if not is_whole and rates is not None and rates.link_gb_per_s is None:
        return "refuses", "experts do not fit, and the profile has no disk or link to page from"
    if expected is not None and expected.step_ms[num_items] > FRAME_MS:
        return "refuses", (
            f"a step of {expected.step_ms[num_items]:.0f} ms makes {FRAME_MS:.1f} ms of sound"
        )
    if is_whole:
        return "fits", "every expert stays in memory"
    return "pages", f"{memory.slots} of {memory.num_experts} experts stay in memory"


def near_window(question: Question, spec: ModelSpec) -> Question:
    """With the encoder's window near the question's length, as `--encoder-window near`."""
    frames = min(round(question.seconds * 50) + 1, spec.encoder.max_frames)
    return dataclasses.replace(question, encoder_frames=frames)


def _unconfirmed(
    profile: DeviceProfile, mode: PowerMode | None, *, pages: bool
) -> dict[str, tuple[str, ...]]:
    """A group of figures rests on these facts, and none of them is confirmed; `total` is what the
    others add up to."""
    facts, products = profile.facts, tuple(dict.fromkeys(_RATES[profile.backend]))
    link = link_of(facts)
    groups = {
        "memory": ("usable_memory_bytes",),
        "step": ("memory_bandwidth_gb_per_s",),
        "prefill": ("memory_bandwidth_gb_per_s", *products),
        "paging": (link[0],) if link and pages else (),
    }
    if pages:
        groups["paging"] += groups["memory"]
        groups["step"] += groups["paging"]
    groups["total"] = (*groups["step"], *groups["prefill"])
    unsure = {
        group: tuple(
            name
            for name in dict.fromkeys(names)
            if (fact := getattr(facts, name)) and not fact.confirmed
        )
        for group, names in groups.items()
    }
    if mode is not None and mode.memory_bandwidth_gb_per_s is not None and not mode.confirmed:
        for group in ("step", "total"):
            unsure[group] += (f"power mode {mode.name}",)
    return {group: names for group, names in unsure.items() if names}
