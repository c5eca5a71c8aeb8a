"""What an export would write and whether the device can hold it: from sizes alone, nothing built.

Sizes of weight files and of experts.bin are exact. Graphs, engines, manifest and golden are
rounded up and say so. Everything that is not arithmetic on the model's sizes is an `Estimate` with
the measurement that it rests on.

memory on the device = weights + cache + workspace + slots x bytes of an expert

Experts that are resident need a slot each. Paged ones take what memory is left, but a slot for
every expert of one layer at least: the rows of a question ask for nearly all of them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deeptalk_edge.bundle.expert_record import INT4_GROUPS, RecordFormat
from deeptalk_edge.devices.profile import DeviceProfile, Fact
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.export.dry_run.files import PlannedFile, planned_files, step_constant_bytes
from deeptalk_edge.export.dry_run.shapes import WeightShapes, weight_bytes
from deeptalk_edge.model.spec import CodecSpec, DecoderSpec, ModelSpec

log = logging.getLogger(__name__)

_MIB = 2**20

_ITEMS = 2  # batch-parallel answers keep two caches
_PREFILL_ROWS = 256

# Beside the weights: libraries, allocator, a CUDA context. Usual sizes, not measured per device.
_RUNTIME_BYTES = {"ort": 192 * _MIB, "cpu": 192 * _MIB}
_RUNTIME_BYTES |= {"tensorrt_rtx": 512 * _MIB, "tensorrt": 512 * _MIB}

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
    """None: nobody has measured anything like it."""
    basis: str

    def spelled(self, unit: float) -> str:
        """For a person, in units of `unit`."""
        return "not known" if self.value is None else f"about {self.value / unit:.1f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What the device must hold."""

    parts: Mapping[str, int]
    """Bytes of weights, cache and workspace by what they are, experts left out."""
    expert_bytes: int
    """One expert's record."""
    num_experts: int
    """Of all layers."""
    min_slots: int
    slots: int | None
    """Experts in memory at once; None if the profile does not state its memory."""
    usable: Fact[int] | None
    """Bytes that the device has for one process."""

    @property
    def fits(self) -> bool | None:
        """None if nobody knows."""
        return None if self.slots is None else self.slots >= self.min_slots

    @property
    def needed_bytes(self) -> int:
        """The least that runs."""
        return sum(self.parts.values()) + self.min_slots * self.expert_bytes


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
    tokenizer_bytes: int | None = None,
) -> ExportPlan:
    """Plan the bundle of a model for a device; a checkpoint without tokenizer is planned without.

    Raises SettingsError if the experts cannot be stored in the profile's precision.
    """
    profile = fitted_profile(profile, model)
    records = record_format(model, profile)
    shapes = WeightShapes.of(model, codec, with_noise=codec_noise == "tape")
    files = planned_files(
        model, codec, codec_noise, profile, shapes, records, context_rows, tokenizer_bytes
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
        memory=_memory(model, profile, shapes, records, context_rows),
        build_memory_bytes=_build_memory(model, profile, shapes),
        build_minutes=_build_minutes(profile, shapes, sum(file.bytes for file in files)),
    )


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


def _memory(
    model: ModelSpec,
    profile: DeviceProfile,
    shapes: WeightShapes,
    records: RecordFormat,
    context_rows: int,
) -> MemoryPlan:
    decoder, encoder = model.decoder, model.encoder
    layer_bytes = _cache_layer_bytes(decoder, profile, context_rows)
    scores = max(
        encoder.num_heads * encoder.max_frames**2,
        decoder.num_heads * _PREFILL_ROWS * context_rows,
    )
    parts = {
        **shapes.bytes(profile.precision),
        "kv_cache": _ITEMS * decoder.num_layers * layer_bytes,
        "workspace": _RUNTIME_BYTES[profile.backend] + 2 * 4 * scores,
    }
    num_experts = len(decoder.moe_layers) * decoder.num_experts
    fact = profile.facts.usable_memory_bytes
    slots = None
    if fact:
        free = max(0, fact.value - sum(parts.values()))
        slots = min(num_experts, free // records.record_bytes)
    return MemoryPlan(
        parts=parts,
        expert_bytes=records.record_bytes,
        num_experts=num_experts,
        min_slots=num_experts if profile.expert_residency == "resident" else decoder.num_experts,
        slots=slots,
        usable=fact,
    )


def _cache_layer_bytes(decoder: DecoderSpec, profile: DeviceProfile, context_rows: int) -> int:
    """One layer of one item's cache."""
    kind = profile.precision.kv_cache
    if profile.backend != "cpu":  # a row more, which no query sees
        return (context_rows + 1) * decoder.cache_width * (4 if kind == "float32" else 2)
    # Both parts of a row padded as in native/cpu/context.h; int8 rows end with two float32 scales.
    value_bytes, step, scales = (1, 128, 8) if kind == "int8" else (2, 32, 0)
    parts = decoder.latent_dim, decoder.rope_dim + scales
    return context_rows * value_bytes * sum(-(-part // step) * step for part in parts)


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
