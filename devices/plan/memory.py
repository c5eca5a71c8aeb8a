"""What a device must hold to run a model, and how many experts stay in memory.

Experts that are resident need a slot each. Paged ones take the remaining memory. Engines need at
least a slot for every expert of one layer, because the rows of a question use nearly all of them at
once. Our CPU kernels and ONNX Runtime, which take experts in waves, need the smallest pool of the
runtime.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from deeptalk_edge.bundle.expert_record import INT4_GROUPS, RecordFormat
from deeptalk_edge.bundle.memory import (
    RESERVE_BYTES,
    cache_bytes,
    least_slots,
    slot_bytes,
    slots_in,
)
from deeptalk_edge.devices.facts import Fact
from deeptalk_edge.devices.plan.shapes import WeightShapes
from deeptalk_edge.devices.profile import DeviceProfile
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.spec import ModelSpec

log = logging.getLogger(__name__)

_MIB = 2**20
_PREFILL_ROWS = 256
_SCORE_BUFFERS = 2

# Beside the weights: libraries, allocator, a CUDA context. Usual sizes, not measured per device.
_RUNTIME_BYTES = {"ort": 192 * _MIB, "cpu": 192 * _MIB}
_RUNTIME_BYTES |= {"tensorrt_rtx": 512 * _MIB, "tensorrt": 512 * _MIB}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What the device must hold."""

    parts: Mapping[str, int]
    """Bytes by what they are, experts left out."""
    expert_bytes: int
    """One expert's slot."""
    num_experts: int
    """Of all layers."""
    min_slots: int
    slots: int | None
    """Experts in memory at once; None if the profile does not state its memory."""
    usable: Fact[int] | None
    """Bytes that the device has for one process."""

    @property
    def fits(self) -> bool | None:
        """None if unknown."""
        return None if self.slots is None else self.slots >= self.min_slots

    @property
    def needed_bytes(self) -> int:
        """The least that runs."""
        return sum(self.parts.values()) + self.min_slots * self.expert_bytes

    @property
    def resident_share(self) -> float | None:
        """Of the experts, those that stay in memory."""
        return None if self.slots is None else self.slots / self.num_experts


def memory_plan(
    model: ModelSpec,
    profile: DeviceProfile,
    shapes: WeightShapes,
    records: RecordFormat,
    context_rows: int,
) -> MemoryPlan:
    """The memory of a model on a device, for a conversation of so many rows."""
    decoder, encoder, backend = model.decoder, model.encoder, profile.backend
    scores = max(
        encoder.num_heads * encoder.max_frames**2,
        decoder.num_heads * _PREFILL_ROWS * context_rows,
    )
    parts = {
        **shapes.bytes(profile.precision),
        "kv_cache": cache_bytes(decoder, backend, profile.precision.kv_cache, context_rows),
        "workspace": _RUNTIME_BYTES[backend] + _SCORE_BUFFERS * 4 * scores,
        "reserve": RESERVE_BYTES,
    }
    num_experts, num_bytes = (
        len(decoder.moe_layers) * decoder.num_experts,
        slot_bytes(records.record_bytes),
    )
    fact, slots = profile.facts.usable_memory_bytes, None
    if fact:
        others = sum(parts.values()) - RESERVE_BYTES  # which `slots_in` takes off itself
        slots = slots_in(fact.value - others, num_records=num_experts, slot_bytes=num_bytes)
    return MemoryPlan(
        parts=parts,
        expert_bytes=num_bytes,
        num_experts=num_experts,
        min_slots=_min_slots(model, profile),
        slots=slots,
        usable=fact,
    )


def _min_slots(model: ModelSpec, profile: DeviceProfile) -> int:
    decoder = model.decoder
    num_experts = len(decoder.moe_layers) * decoder.num_experts
    if profile.expert_residency == "resident":
        return num_experts
    if profile.has_engines:
        return decoder.num_experts
    return min(least_slots(decoder.top_k), num_experts)


def fitted_profile(profile: DeviceProfile, model: ModelSpec) -> DeviceProfile:
    """The profile with the largest int4 group up to its own that divides the experts' widths; says
    so where that is another one. A profile whose groups all fail stays as it is."""
    own = profile.precision.expert_group
    sizes = model.decoder.width, model.decoder.expert_ffn_width
    fitting = [g for g in INT4_GROUPS if g <= (own or 0) and not any(size % g for size in sizes)]
    if not fitting or max(fitting) == own:
        return profile
    log.warning(
        "device %s: int4 experts in groups of %d: %d does not divide the widths %d and %d",
        *(profile.name, max(fitting), own, *sizes),
    )
    precision = dataclasses.replace(profile.precision, expert_group=max(fitting))
    return dataclasses.replace(profile, precision=precision)


def record_format(model: ModelSpec, profile: DeviceProfile) -> RecordFormat:
    """How the profile stores this model's experts.

    Raises SettingsError if their sizes do not allow it.
    """
    precision = profile.precision
    try:
        return RecordFormat(
            dtype=precision.experts,
            group=precision.expert_group,
            width=model.decoder.width,
            ffn_width=model.decoder.expert_ffn_width,
        )
    except ValueError as error:
        raise SettingsError(f"device {profile.name}: {error}; choose another precision") from error
