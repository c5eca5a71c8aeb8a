"""What an export would write and whether the device can hold it: from sizes alone, nothing built.

Sizes of weight files and of experts.bin are exact. Graphs, engines, manifest and golden are
rounded up and say so. Everything that is not arithmetic on the model's sizes is an `Estimate` with
the measurement that it rests on.

The memory on the device is planned by devices/plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deeptalk_edge.devices.plan.memory import (
    MemoryPlan,
    fitted_profile,
    memory_plan,
    record_format,
)
from deeptalk_edge.devices.plan.shapes import WeightShapes, weight_bytes
from deeptalk_edge.devices.profile import DeviceProfile
from deeptalk_edge.export.dry_run.files import PlannedFile, planned_files, step_constant_bytes
from deeptalk_edge.export.dry_run.steps import PlannedStep, planned_steps
from deeptalk_edge.model.spec import CodecSpec, ModelSpec

# `bench export_memory`: 1.93 GB at official width, converting a table of 1.08 GB in float32.
# Running an encoder of 1.35 GB takes 1.72.
_EXPORTER_BYTES, _TABLE_RATIO, _ENCODER_RATIO = 150e6, 1.7, 1.2
_WRITTEN_BYTES_PER_S = 50e6
# TensorRT-RTX 1.7 on 2 shared x86-64 cores: a plan of 1.69 GB took 6.1 GB and 26.5 s, one of 26 MB
# 0.44 GB.
_BUILDER_BYTES, _BUILDER_RATIO = 440e6, 3.35
_BUILDER_S_PER_BYTE = 26.5 / 1.69e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure that is not arithmetic."""

    value: float | None
    """None: nothing like it has been measured."""
    basis: str

    def spelled(self, unit: float) -> str:
        """For a person, in units of `unit`."""
        return "not known" if self.value is None else f"about {self.value / unit:.1f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """All of it; `dataclasses.asdict` is ready for JSON."""

    device: str
    backend: str
    moe: str
    residency: str
    targets: tuple[str, ...]
    precision: Mapping[str, str]
    files: tuple[PlannedFile, ...]
    context_rows: int
    memory: MemoryPlan
    steps: tuple[PlannedStep, ...]
    """Of the step's engine, by its profiles; none without engines."""
    build_memory_bytes: Estimate
    build_minutes: Estimate

    @property
    def total_bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def plan_export(
    model: ModelSpec,
    codec: CodecSpec,
    profile: DeviceProfile,
    *,
    codec_noise: Literal["off", "tape"] = "off",
    context_rows: int = 4096,
    copied: Mapping[str, int] | None = None,
) -> ExportPlan:
    """Plan the bundle of a model for a device; a checkpoint without tokenizer is planned without.

    Raises SettingsError if the experts cannot be stored in the profile's precision.
    """
    profile = fitted_profile(profile, model)
    records = record_format(model, profile)
    shapes = WeightShapes.of(model, codec, with_noise=codec_noise == "tape")
    files = planned_files(
        model, codec, codec_noise, profile, shapes, records, context_rows, copied or {}
    )
    return ExportPlan(
        device=profile.name,
        backend=profile.backend,
        moe=profile.moe,
        residency=profile.expert_residency,
        targets=profile.targets,
        precision=profile.precision.spelled(),
        files=files,
        context_rows=context_rows,
        memory=memory_plan(model, profile, shapes, records, context_rows),
        steps=planned_steps(model, codec, profile, records, context_rows),
        build_memory_bytes=_build_memory(model, profile, shapes),
        build_minutes=_build_minutes(profile, shapes, sum(file.bytes for file in files)),
    )


def _build_memory(model: ModelSpec, profile: DeviceProfile, shapes: WeightShapes) -> Estimate:
    """What the exporting machine must hold: the number of layers counts only for an engine."""
    table, hearing = (weight_bytes(part, "float32") for part in (shapes.embedding, shapes.encoder))
    exporter = _EXPORTER_BYTES + max(_TABLE_RATIO * table, _ENCODER_RATIO * hearing)
    basis = "the embedding or the encoder in float32 and a copy, as `bench export_memory` measured"
    if not profile.has_engines:
        return Estimate(value=exporter, basis=basis)
    encoder = weight_bytes(shapes.encoder, profile.precision.encoder)
    largest = max(encoder, step_constant_bytes(model, profile, shapes))
    builder = _BUILDER_BYTES + _BUILDER_RATIO * largest
    if builder > exporter:
        basis = "3.35 times the largest engine, as TensorRT-RTX took for a 27-layer decoder"
    if profile.backend == "tensorrt":
        basis += "; TensorRT itself was not measured"
    return Estimate(value=max(builder, exporter), basis=basis)


def _build_minutes(profile: DeviceProfile, shapes: WeightShapes, written_bytes: int) -> Estimate:
    """How long the export takes."""
    if profile.backend == "tensorrt":
        return Estimate(value=None, basis="TensorRT builds on the device; we had none to measure")
    basis = "50 MB written a second, on 2 shared x86-64 cores; measured 21 (busy) to 220"
    if not profile.has_engines:
        return Estimate(value=written_bytes / _WRITTEN_BYTES_PER_S / 60, basis=basis)
    graph_bytes = sum(shapes.bytes(profile.precision).values())  # written, built from, dropped
    engines_s = graph_bytes * _BUILDER_S_PER_BYTE
    return Estimate(
        value=((written_bytes + graph_bytes) / _WRITTEN_BYTES_PER_S + engines_s) / 60,
        basis=f"{basis}; 16 s for each GB of engine, as a 27-layer decoder took",
    )
