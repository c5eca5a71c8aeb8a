"""What a step of each engine profile reads and launches, and its floor: computed, never measured.

bytes     weights once, the experts of the items, which choose apart, and every cached row that the
          profile sees: an engine reads all of them, whether they count or not
kernels   counted in plans that TensorRT-RTX 1.7.1 built without a GPU for 2 and 3 layers of the
          official widths; a plugin is three
floor     bytes over the memory's full rate; launches are left out, for a step is one CUDA graph
"""

from __future__ import annotations

from dataclasses import dataclass

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.devices.plan.work import ModelWork
from deeptalk_edge.devices.profile import DeviceProfile
from deeptalk_edge.model.spec import CodecSpec, ModelSpec

PROMPT_ROWS = 256

_LAYER_OPERATIONS = {1: 26, 2: 27}
"""Of a MoE layer with the plugin, by items; `max_aux_streams` is 0."""
_PROMPT_LAYER_OPERATIONS = 29
_OTHER_OPERATIONS = 24  # embedding, the dense layer, norm and head
_PLUGIN_KERNELS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """One profile of the step's engine."""

    profile: str
    cached_rows: int
    num_items: int
    num_rows: int
    bytes: float
    kernels: int | None
    """None: the form without the plugin was not counted."""
    floor_ms: float | None
    """None: the device profile states no memory rate."""


def planned_steps(
    model: ModelSpec,
    codec: CodecSpec,
    profile: DeviceProfile,
    records: RecordFormat,
    context_rows: int,
) -> tuple[PlannedStep, ...]:
    """One for each profile of the step's engine; none for a device without engines."""
    if not profile.has_engines:
        return ()
    work = ModelWork.of(model, codec, profile.precision, records)
    has_plugin = profile.moe == "plugin"
    rate = profile.facts.memory_bandwidth_gb_per_s

    def step(name: str, cached: int, items: int, rows: int) -> PlannedStep:
        if rows > 1:
            num_bytes = work.prefill_bytes(rows) + cached * work.cache_row_bytes
        else:
            num_bytes = work.step_bytes(items, cached, alike=False)
        return PlannedStep(
            profile=name,
            cached_rows=cached,
            num_items=items,
            num_rows=rows,
            bytes=num_bytes,
            kernels=_kernels(work.num_moe_layers, items, rows) if has_plugin else None,
            floor_ms=num_bytes / (rate.value * 1e6) if rate else None,
        )

    quarter = max(1, context_rows // 4)
    steps = [
        step(f"decode, {cached} rows", cached, items, 1)
        for cached in (quarter, context_rows)
        for items in (1, 2)
    ]
    if has_plugin:
        steps.append(step(f"prompt of {PROMPT_ROWS}", context_rows, 1, PROMPT_ROWS))
    return tuple(steps)


def _kernels(num_moe_layers: int, num_items: int, num_rows: int) -> int:
    of_layer = _LAYER_OPERATIONS[num_items] if num_rows == 1 else _PROMPT_LAYER_OPERATIONS
    return num_moe_layers * (of_layer + _PLUGIN_KERNELS - 1) + _OTHER_OPERATIONS
