"""Bundles for the CPU backend, and float32 bundles with exactly the same weights.

A checkpoint's matrices are rounded to int8 or int4 and written again in float32. ONNX Runtime on
them is the CPU engine's reference: only activations and cache differ.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from deeptalk_edge.bundle.expert_record import ExpertDtype, RecordFormat
from deeptalk_edge.bundle.manifest import Experts
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.quantise import quantise_int4, quantise_int8
from deeptalk_edge.checkpoint.reader import EMBEDDING, HEAD, Checkpoint
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.export.packed.cpu_weights import CpuPrecision, write_native_weights
from deeptalk_edge.export.packed.experts import RoundedExperts, write_experts
from deeptalk_edge.model.spec import DecoderSpec

Array = NDArray[np.float32]


def write_bundles(
    checkpoint: Path, place: Path, *, dtype: ExpertDtype, group: int | None
) -> tuple[Bundle, Bundle]:
    """A float32 bundle of the rounded checkpoint, and the CPU bundle of the same weights."""
    rounded = place / "checkpoint"
    shutil.copytree(checkpoint, rounded)
    spec = Checkpoint.open(checkpoint).spec.decoder
    tensors = load_file(rounded / "model.safetensors")
    for name, tensor in tensors.items():
        tensors[name] = _rounded(name, tensor.astype(np.float32), spec, group)
    save_file(tensors, rounded / "model.safetensors")
    export_bundle(rounded, place / "bundle", ExportSettings())
    reference = Bundle.open(place / "bundle")
    records = RecordFormat(
        dtype=dtype, group=group, width=spec.width, ffn_width=spec.expert_ffn_width
    )
    source = Checkpoint.open(rounded)
    experts = reference.path / "native_experts.bin"
    no_audio: list[list[int]] = [[] for _ in spec.moe_layers]
    rounding = RoundedExperts(source, records)
    written = write_experts(spec, rounding, no_audio, experts, lambda *_: None)
    precision = CpuPrecision(matrix_group=group, table_group=group)
    write_native_weights(source, records, precision, reference.path)
    manifest = dataclasses.replace(
        reference.manifest,
        experts=Experts(file=experts.name, dtype=dtype, group=group, records=tuple(written)),
    )
    return reference, Bundle(reference.path, manifest)


def _rounded(name: str, tensor: Array, spec: DecoderSpec, group: int | None) -> Array:
    if name.endswith("kv_b_proj.weight"):
        by_head = tensor.reshape(spec.num_heads, -1, spec.latent_dim)
        key, value = np.split(by_head, [spec.nope_dim], axis=1)
        key = _through(key.transpose(0, 2, 1), group).transpose(0, 2, 1)
        return np.concatenate([key, _through(value, group)], axis=1).reshape(tensor.shape)
    if "shared_experts.down_proj" in name:  # cut into records
        parts = np.split(tensor, spec.num_shared_experts, axis=1)
        return np.concatenate([_through(part, None) for part in parts], axis=1)
    if ".mlp." in name and ".experts." not in name:  # every token uses it: always int8
        group = None
    is_matrix = name in (EMBEDDING, HEAD) or ("_proj" in name and ".layers." in name)
    is_ours = "audio_encoder" not in name and "projector" not in name
    return _through(tensor, group) if is_matrix and is_ours else tensor


def _through(tensor: Array, group: int | None) -> Array:
    """The values of the packed form of (..., K)."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    columns = rows.shape[1]
    sizes = [g for g in (128, 64, 32) if group and g <= group and columns % g == 0]
    if not sizes:
        weights, scales = quantise_int8(rows)
        return (weights * scales).reshape(tensor.shape).astype(np.float32)
    packed, halves = quantise_int4(rows, sizes[0])
    steps = np.repeat(halves.astype(np.float32), sizes[0], axis=1)
    return (packed * steps).reshape(tensor.shape).astype(np.float32)
