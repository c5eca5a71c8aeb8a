"""The files of a bundle and their sizes, before one is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deeptalk_edge.bundle.expert_record import PAGE_BYTES, RecordFormat
from deeptalk_edge.bundle.manifest import GATES, NATIVE_CODEC, NATIVE_INDEX, NATIVE_WEIGHTS
from deeptalk_edge.bundle.target import TargetBackend
from deeptalk_edge.bundle.understanding import FILES as UNDERSTANDING_FILES
from deeptalk_edge.devices.plan.shapes import (
    WeightShapes,
    int8_encoder_bytes,
    stored_bytes,
    weight_bytes,
)
from deeptalk_edge.devices.profile import DeviceProfile
from deeptalk_edge.export.graphs.codec import CodecNoise
from deeptalk_edge.export.packed.cpu_codec import native_codec_bytes
from deeptalk_edge.export.packed.cpu_weights import native_bytes
from deeptalk_edge.model.spec import CodecSpec, ModelSpec

_MIB = 2**20
_GRAPH_BYTES = _MIB
# What TensorRT-RTX 1.7 adds to an engine's constants, and to those of the step for each layer.
_KERNEL_BYTES = {"codec": 6 * _MIB, "embed": _MIB, "encoder": 4 * _MIB, "head": _MIB}
_LAYER_KERNEL_BYTES = 4 * _MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedFile:
    """A file of the bundle."""

    name: str
    bytes: int
    is_exact: bool
    """Else rounded up."""


def step_dense(profile: DeviceProfile) -> Literal["float", "given", "int8"]:
    """How the step of an engine holds its dense weights.

    With the plugin it has profiles of one row and of many, and TensorRT-RTX stores constants once
    for each: float weights are inputs there.
    """
    if profile.precision.decoder == "int8":
        return "int8"
    return "given" if profile.moe == "plugin" else "float"


def step_constant_bytes(model: ModelSpec, profile: DeviceProfile, shapes: WeightShapes) -> int:
    """What of the decoder's weights an engine holds, as often as it does."""
    decoder = model.decoder
    held = shapes.decoder
    if step_dense(profile) == "given":
        router = (decoder.num_experts, decoder.width)
        held = [shape for shape in held if len(shape) != 2 or shape == router]
    num_layouts = 2 if profile.moe == "plugin" else 1
    return num_layouts * weight_bytes(held, profile.precision.decoder)


def planned_files(
    model: ModelSpec,
    codec: CodecSpec,
    codec_noise: CodecNoise,
    profile: DeviceProfile,
    shapes: WeightShapes,
    records: RecordFormat,
    context_rows: int,
    copied: Mapping[str, int],
) -> tuple[PlannedFile, ...]:
    """Every file; `copied` are those that the checkpoint has as they are, with their bytes."""
    num_experts = len(model.decoder.moe_layers) * model.decoder.num_experts
    if profile.has_engines:
        files = _engine_files(model, profile, shapes, context_rows)
    else:
        decoder = model.decoder
        gates_bytes = 4 * len(decoder.moe_layers) * (decoder.num_experts + 1) * decoder.width
        files = [*_ort_files(model, profile, shapes), _rounded(GATES, gates_bytes + 1024)]
    if profile.backend == "cpu":
        size = native_bytes(model, records)
        files += [
            PlannedFile(name=NATIVE_WEIGHTS, bytes=size, is_exact=True),
            _rounded(NATIVE_INDEX, 4096 * (model.decoder.num_layers + 1)),
            PlannedFile(
                name=NATIVE_CODEC, bytes=native_codec_bytes(codec, codec_noise), is_exact=True
            ),
        ]
    files += [
        PlannedFile(name="experts.bin", bytes=num_experts * records.record_bytes, is_exact=True),
        _rounded("golden.npz", _golden_bytes(model, codec, profile.backend)),
        _rounded("parity.json", 16384),
        _rounded("manifest.json", 16384 + 160 * num_experts),
    ]
    files += [
        PlannedFile(name=name, bytes=num_bytes, is_exact=True) for name, num_bytes in copied.items()
    ]
    return tuple(files)


def copied_files(checkpoint: Path) -> dict[str, int]:
    """The files that an export copies from a checkpoint as they are, with their bytes."""
    places = (checkpoint / name for name in ("tokenizer.json", *UNDERSTANDING_FILES))
    return {place.name: place.stat().st_size for place in places if place.is_file()}


def _ort_files(model: ModelSpec, profile: DeviceProfile, shapes: WeightShapes) -> list[PlannedFile]:
    """Graphs and their weights."""
    weights = {"encoder": shapes.encoder, "embedding": shapes.embedding, "codec": shapes.codec}
    weights["head"] = shapes.head
    weights |= {f"segment_{i:02d}": segment for i, segment in enumerate(shapes.segments)}
    sizes = {name: stored_bytes(parts) for name, parts in weights.items()}
    if profile.precision.encoder == "int8":
        sizes["encoder"] = int8_encoder_bytes(model)
    nodes = {
        "encoder": 12 * (model.encoder.num_layers + 2),
        "codec": 96,
        "embed": 4,
        "expert": 4,
        "head": 4,
        "segment_00": 8 * (model.decoder.num_dense_layers + 2),
    } | {f"segment_{i:02d}": 16 for i in range(1, len(shapes.segments))}
    files = [_rounded(f"{name}.onnx", 1024 * kib) for name, kib in nodes.items()]
    for name, size in sizes.items():
        if size:
            files.append(PlannedFile(name=f"{name}.bin", bytes=size, is_exact=True))
    return sorted(files, key=lambda file: file.name)


def _engine_files(
    model: ModelSpec, profile: DeviceProfile, shapes: WeightShapes, context_rows: int
) -> list[PlannedFile]:
    """The engines of a finished bundle, each its constants and its kernels; for TensorRT, which
    builds them on the device, the graphs as well. Embed and a tied head share embedding.bin."""
    weights = shapes.bytes(profile.precision)
    rotary_bytes = 8 * context_rows * model.decoder.rope_dim
    constants = {
        "codec": weights["codec"],
        "embed": 0,
        "encoder": weights["encoder"],
        "head": 0,
        "step": step_constant_bytes(model, profile, shapes) + rotary_bytes,
    }
    kernels = _KERNEL_BYTES | {"step": _LAYER_KERNEL_BYTES * (model.decoder.num_layers + 1)}
    files = [_rounded(f"{name}.engine", constants[name] + kernels[name]) for name in constants]
    for name, table in (("embedding.bin", shapes.embedding), ("head.bin", shapes.head)):
        size = -(-weight_bytes(table, profile.precision.head) // PAGE_BYTES) * PAGE_BYTES
        if table:
            files.append(PlannedFile(name=name, bytes=size, is_exact=True))
    if profile.backend == "tensorrt":
        files.append(_rounded("step_native.onnx", _GRAPH_BYTES))  # the step without the plugin
        files += [_rounded(f"{name}.onnx", _GRAPH_BYTES) for name in constants]
        for name, parts in (("codec", shapes.codec), ("encoder", shapes.encoder)):
            files.append(_rounded(f"{name}.bin", weights[name] + PAGE_BYTES * len(parts)))
    is_given = step_dense(profile) == "given"
    if is_given:
        places_bytes = 1024 * model.decoder.num_layers
        files.append(_rounded("step.weights.json", places_bytes))
    if is_given or profile.backend == "tensorrt":
        padding_bytes = PAGE_BYTES * 2 * len(shapes.decoder)
        files.append(_rounded("step.bin", weights["decoder"] + rotary_bytes + padding_bytes))
    return sorted(files, key=lambda file: file.name)


def _golden_bytes(model: ModelSpec, codec: CodecSpec, backend: TargetBackend) -> int:
    """The outputs for about fifteen encoder frames, heard twice, a dozen rows and four codec
    frames; the kernels have separate logits."""
    vocabulary = model.vocabulary
    logits = 2 * (vocabulary.text_size + vocabulary.num_codebooks * vocabulary.codebook_block)
    sound = 4 * codec.frame_samples
    pcm = 4800
    if backend == "cpu":
        logits *= 2
    return 4 * (43 * model.decoder.width + logits + sound + pcm) + 8192


def _rounded(name: str, size: int) -> PlannedFile:
    pages = -(-size // PAGE_BYTES)
    return PlannedFile(name=name, bytes=pages * PAGE_BYTES, is_exact=False)
