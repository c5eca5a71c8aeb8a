"""`native.bin` and `native.json`: everything of the decoder but its routed experts, packed for the
native CPU backend.

Matrices lie as native/cpu reads them, row-major, int8 or int4 followed by their scales; norms and
the router stay float32. Shared experts are cut into records like the routed ones, and a dense
layer's MLP is one record as wide as it is: kernels know one form of MLP.

    qkv        q_proj and kv_a_proj as [q_nope | q_rope, k_rope | latent], rotary halves apart
    key_up     kv_b_proj's part after the query: per head nope to latent
    value_up   kv_b_proj's part after the mixing: per head latent to value
    table      the embedding, and the head if it is tied
    head       the head if it is not
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import PAGE_BYTES, RecordFormat, pack_int4
from deeptalk_edge.bundle.manifest import NATIVE_INDEX, NATIVE_WEIGHTS
from deeptalk_edge.bundle.native_index import (
    ALIGN_BYTES,
    MatrixPlace,
    MlpPlace,
    Place,
    VectorPlace,
    own_mlp_form,
    own_records,
    write_native_index,
)
from deeptalk_edge.calibration.quantise import quantise_expert, quantise_int4, quantise_int8
from deeptalk_edge.checkpoint.mla import absorbed_projections, folded_projections
from deeptalk_edge.checkpoint.reader import EMBEDDING, HEAD, Checkpoint
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import ModelSpec

_GROUPS = (128, 64, 32)  # of int4 matrices, largest first
_BLOCK_ROWS = 4096  # of a matrix, quantised at once

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuPrecision:
    """How the dense matrices are stored."""

    matrix_group: int | None = None
    """Weights that share an int4 scale, at most; None means int8. A matrix whose rows are not whole
    groups takes smaller ones, at last int8."""

    table_group: int | None = None
    """The same for the embedding and the head."""

    def __post_init__(self) -> None:
        for group in (self.matrix_group, self.table_group):
            if group is not None and group not in _GROUPS:
                raise ValueError(f"int4 group of {group}: known are {_GROUPS}, or None for int8")


def write_native_weights(
    checkpoint: Checkpoint, records: RecordFormat, precision: CpuPrecision, directory: Path
) -> None:
    """Write native.bin and native.json; `records` is the format of the routed experts.

    Raises ArtifactError if the routed experts are neither int8 nor int4, or a weight cannot be
    held.
    """
    if records.dtype not in ("int8", "int4"):
        raise ArtifactError(
            f"experts in {records.dtype}: the native backend reads int8 and int4; choose one"
        )
    with (directory / NATIVE_WEIGHTS).open("wb") as file:
        writer = _Writer(file)
        matrices = precision.matrix_group
        writer.matrix("table", checkpoint.tensor(EMBEDDING), precision.table_group)
        if not checkpoint.spec.tied_head:
            writer.matrix("head", checkpoint.tensor(HEAD), precision.table_group)
        writer.vector("final_norm", checkpoint.tensor("model.norm.weight"))
        spec = checkpoint.spec.decoder
        for layer in range(spec.num_layers):
            weights = LayerWeights(checkpoint, layer)
            name = f"layers.{layer}"
            writer.matrix(f"{name}.qkv", weights.projections(), matrices)
            key_up, value_up = weights.up_projections()
            writer.matrix(f"{name}.key_up", key_up, matrices)
            writer.matrix(f"{name}.value_up", value_up, matrices)
            writer.matrix(f"{name}.out", weights.tensor("self_attn.o_proj"), matrices)
            for norm in ("input_layernorm", "post_attention_layernorm", "self_attn.kv_a_layernorm"):
                writer.vector(f"{name}.{norm}", weights.tensor(norm))
            if layer in spec.moe_layers:
                writer.vector(f"{name}.router", weights.tensor("mlp.gate").ravel())
            for i, (form, gate_up, down) in enumerate(weights.own_mlps(records)):
                writer.record(f"{name}.mlp.{i}", form, gate_up, down)
    write_native_index(directory / NATIVE_INDEX, records, checkpoint.spec, writer.arrays)


def round_matrix(values: Array, group: int | None) -> None:
    """Change a matrix (rows, columns) to what native.bin holds of it; `group` as in
    `CpuPrecision`."""
    group = _group_of(values.shape[1], group)
    for start in range(0, len(values), _BLOCK_ROWS):
        block = values[start : start + _BLOCK_ROWS]
        integers, scales = quantise_int4(block, group) if group else quantise_int8(block)
        groups = integers.reshape(*scales.shape, -1)
        block[:] = (groups * scales[..., None].astype(np.float32)).reshape(block.shape)


def _group_of(columns: int, most: int | None) -> int:
    """Weights of an int4 row that share a scale; 0 is int8."""
    return next((g for g in _GROUPS if most and g <= most and columns % g == 0), 0)


def native_bytes(spec: ModelSpec, records: RecordFormat) -> int:
    """The size of native.bin with dense matrices in int8."""
    decoder = spec.decoder
    heads, latent, width = decoder.num_heads, decoder.latent_dim, decoder.width
    turned = heads * (decoder.nope_dim + decoder.rope_dim) + decoder.cache_width
    matrices = [
        (turned, width),
        (heads * latent, decoder.nope_dim),
        (heads * decoder.value_dim, latent),
        (width, heads * decoder.value_dim),
    ]
    end = 0
    for _ in ("table",) if spec.tied_head else ("table", "head"):
        end = _matrix_end(end, spec.vocabulary.size, width)
    end = _end(end, 4 * width, ALIGN_BYTES)
    for layer in range(decoder.num_layers):
        is_dense = layer not in decoder.moe_layers
        router = [] if is_dense else [decoder.num_experts * width]
        ffn_width = decoder.dense_ffn_width if is_dense else decoder.shared_ffn_width
        for matrix in matrices:
            end = _matrix_end(end, *matrix)
        for size in [width, width, latent, *router]:
            end = _end(end, 4 * size, ALIGN_BYTES)
        form = own_mlp_form(decoder, layer, own_records(records))
        for _ in range(0, ffn_width, form.ffn_width):
            end = _end(end, form.record_bytes, PAGE_BYTES)
    return end


def _matrix_end(start: int, rows: int, columns: int) -> int:
    """Where an int8 matrix and its scales end."""
    return _end(_end(start, rows * columns, ALIGN_BYTES), 4 * rows, ALIGN_BYTES)


def _end(start: int, size: int, align: int) -> int:
    return -(-start // align) * align + size


class LayerWeights:
    """One layer's tensors in the shapes of the native kernels."""

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        self._checkpoint = checkpoint
        self._name = f"model.layers.{layer}"
        self._layer, self._spec = layer, checkpoint.spec.decoder
        self._is_dense = layer not in self._spec.moe_layers

    def tensor(self, name: str) -> Array:
        return self._checkpoint.tensor(f"{self._name}.{name}.weight")

    def projections(self) -> Array:
        """(H nope + (H + 1) rope + latent, C)"""
        return folded_projections(self._checkpoint, f"{self._name}.self_attn")

    def up_projections(self) -> tuple[Array, Array]:
        """W_k (H latent, nope) and W_v (H value, latent)."""
        key_up, value_up = (
            np.ascontiguousarray(up.transpose(0, 2, 1))
            for up in absorbed_projections(self._checkpoint, f"{self._name}.self_attn")
        )
        return key_up.reshape(-1, key_up.shape[2]), value_up.reshape(-1, value_up.shape[2])

    def own_mlps(self, records: RecordFormat) -> Iterator[tuple[RecordFormat, Array, Array]]:
        """The MLPs that every token takes, as records of gate_up (2G, C) and down (C, G), beside
        routed experts in `records`."""
        if not self._is_dense and not self._spec.num_shared_experts:
            return
        prefix = "mlp" if self._is_dense else "mlp.shared_experts"
        gate, up, down = (self.tensor(f"{prefix}.{part}_proj") for part in ("gate", "up", "down"))
        form = own_mlp_form(self._spec, self._layer, own_records(records))
        for start in range(0, len(gate), form.ffn_width):
            part = slice(start, start + form.ffn_width)
            missing = max(part.stop - len(gate), 0)  # hidden values that are always zero
            rows, columns = ((0, missing), (0, 0)), ((0, 0), (0, missing))
            gate_up = np.concatenate([np.pad(gate[part], rows), np.pad(up[part], rows)])
            yield form, gate_up, np.pad(down[:, part], columns)


class _Writer:
    """Appends arrays and notes where they lie."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.arrays: dict[str, Place] = {}

    def vector(self, name: str, values: Array) -> None:
        offset = self._append(values, ALIGN_BYTES)
        self.arrays[name] = VectorPlace(offset=offset, size=values.size)

    def matrix(self, name: str, values: Array, group: int | None) -> None:
        """Quantise and write a matrix, some rows at a time."""
        rows, columns = values.shape
        group = _group_of(columns, group)
        weights, scales = [], []
        for start in range(0, rows, _BLOCK_ROWS):
            block = values[start : start + _BLOCK_ROWS]
            try:
                parts = quantise_int4(block, group) if group else quantise_int8(block)
            except ValueError as error:
                raise ArtifactError(f"{name}: {error}") from error
            weights.append(pack_int4(parts[0]) if group else parts[0])
            scales.append(parts[1])
        self.arrays[name] = MatrixPlace(
            offset=self._append(np.concatenate(weights), ALIGN_BYTES),
            scales_offset=self._append(np.concatenate(scales), ALIGN_BYTES),
            rows=rows,
            columns=columns,
            group=group,
        )

    def record(self, name: str, form: RecordFormat, gate_up: Array, down: Array) -> None:
        try:
            record = form.pack(quantise_expert(form, gate_up, down))
        except ValueError as error:
            raise ArtifactError(f"{name}: {error}") from error
        offset = self._append(record, PAGE_BYTES)
        self.arrays[name] = MlpPlace(offset=offset, ffn_width=form.ffn_width)

    def _append(self, values: NDArray[Any], align: int) -> int:
        self._file.write(bytes(-self._file.tell() % align))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(values).data)
        return offset
