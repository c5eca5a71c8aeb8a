"""`native.json`: where each array of `native.bin` lies, for its writer and its reader.

arrays    `expected_arrays` names all that a model has, and nothing else may be there
places    offsets are multiples of 64 bytes; `extents` gives every byte range that an entry claims,
          so a reader checks them against the file, and kernels check shapes against the model

Source of the format: docs/bundle.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from deeptalk_edge.bundle.expert_record import INT4_GROUPS, ExpertForm, RecordFormat
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import DecoderSpec, ModelSpec
from deeptalk_edge.schema import Between, from_json, read_json

FORMAT = 1
ALIGN_BYTES = 64

Offset: TypeAlias = Annotated[int, Between(0, 1 << 48)]
Size: TypeAlias = Annotated[int, Between(1, 1 << 32)]
Extent: TypeAlias = tuple[str, int, int]
"""The field that says where, the offset, and how many bytes lie there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorPlace:
    """A float32 array."""

    offset: Offset
    size: Size

    def extents(self, records: RecordFormat) -> Iterator[Extent]:
        yield "offset", self.offset, 4 * self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixPlace:
    """An int8 or int4 matrix and its scales."""

    offset: Offset
    scales_offset: Offset
    rows: Size
    columns: Size
    group: Annotated[int, Between(0, max(INT4_GROUPS))]
    """Weights that share an int4 scale; 0 is int8."""

    def __post_init__(self) -> None:
        if self.group not in (0, *INT4_GROUPS):
            raise ValueError(f"group = {self.group}: expected 0 or one of {INT4_GROUPS}")
        if self.group and self.columns % self.group:
            raise ValueError(f"columns = {self.columns}: expected whole groups of {self.group}")

    def extents(self, records: RecordFormat) -> Iterator[Extent]:
        weights = self.rows * self.columns
        yield "offset", self.offset, weights // 2 if self.group else weights
        scales = weights // self.group * 2 if self.group else 4 * self.rows
        yield "scales_offset", self.scales_offset, scales


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpPlace:
    """An MLP that every token takes, packed as a routed expert is."""

    offset: Offset
    ffn_width: Size

    def extents(self, records: RecordFormat) -> Iterator[Extent]:
        form = dataclasses.replace(records, ffn_width=self.ffn_width)
        yield "offset", self.offset, form.content_bytes


Place: TypeAlias = VectorPlace | MatrixPlace | MlpPlace


def expected_arrays(model: ModelSpec) -> dict[str, type[Place]]:
    """Every array of a model, and what it is."""
    decoder = model.decoder
    arrays: dict[str, type[Place]] = {"table": MatrixPlace, "final_norm": VectorPlace}
    if not model.tied_head:
        arrays["head"] = MatrixPlace
    for layer in range(decoder.num_layers):
        routes = layer in decoder.moe_layers
        kinds: dict[str, type[Place]] = dict.fromkeys(
            ("qkv", "key_up", "value_up", "out"), MatrixPlace
        )
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.kv_a_layernorm")
        kinds |= dict.fromkeys(norms, VectorPlace)
        kinds |= {"router": VectorPlace} if routes else {}
        num_mlps = decoder.num_shared_experts if routes else 1
        kinds |= {f"mlp.{i}": MlpPlace for i in range(num_mlps)}
        arrays |= {f"layers.{layer}.{name}": kind for name, kind in kinds.items()}
    return arrays


def own_records(records: RecordFormat) -> RecordFormat:
    """The form of MLPs that every token takes, beside routed experts of another: always int8, for
    an error there meets every token."""
    return dataclasses.replace(records, dtype="int8", group=None)


def own_mlp_form(decoder: DecoderSpec, layer: int, own: RecordFormat) -> RecordFormat:
    """How the MLPs lie that every token of a layer takes: shared experts as wide as the routed
    ones, a dense layer's as wide as it is, in whole groups."""
    if layer in decoder.moe_layers:
        return own
    step = own.group or 16
    width = -(-decoder.dense_ffn_width // step) * step
    return dataclasses.replace(own, ffn_width=width)


def write_native_index(
    path: Path, records: RecordFormat, model: ModelSpec, arrays: Mapping[str, Place]
) -> None:
    """Write the form that `read_native_index` reads."""
    assert arrays.keys() == expected_arrays(model).keys()
    own = own_records(records)
    content = {
        "format": FORMAT,
        "experts": {"dtype": records.dtype, "group": records.group},
        "own_mlps": {"dtype": own.dtype, "group": own.group},
        "arrays": {name: dataclasses.asdict(place) for name, place in arrays.items()},
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_native_index(
    path: Path, records: RecordFormat, model: ModelSpec, file_bytes: int
) -> tuple[dict[str, Place], RecordFormat]:
    """The place of each array in a `native.bin` of so many bytes, and the form of the MLPs that
    every token takes.

    Raises ArtifactError naming the file and the field if it is missing, of another format, made for
    other expert records, or an array is missing or does not lie in the file.
    """
    content = read_json(path)
    try:
        own = _checked_header(content, records)
        places = _places(content.get("arrays"), model)
        for name, place in places.items():
            _check_place(f"arrays.{name}", place, own, file_bytes)
            if isinstance(place, MlpPlace):
                form = own_mlp_form(model.decoder, _layer_of(name), own)
                _check_mlp(f"arrays.{name}", place, form)
    except (ArtifactError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}; export the bundle again") from error
    return places, own


def _checked_header(content: Mapping[str, Any], records: RecordFormat) -> RecordFormat:
    """The form of the MLPs that every token takes; files without one hold them like the experts.

    Raises ArtifactError if the file was made for other experts.
    """
    found = content.get("format")
    if type(found) is not int or found != FORMAT:
        raise ArtifactError(f"format {str(found)[:60]}, this runtime reads {FORMAT}")
    form = from_json(ExpertForm, content.get("experts"), "experts")
    if (form.dtype, form.group) != (records.dtype, records.group):
        raise ArtifactError(
            f"made for experts in {form.dtype} with group {form.group}, the bundle holds "
            f"{records.dtype} with group {records.group}"
        )
    if "own_mlps" not in content:
        return records
    own = from_json(ExpertForm, content["own_mlps"], "own_mlps")
    return dataclasses.replace(records, dtype=own.dtype, group=own.group)


def _places(arrays: object, model: ModelSpec) -> dict[str, Place]:
    if not isinstance(arrays, dict):
        raise ArtifactError("arrays: expected an object")
    expected = expected_arrays(model)
    if missing := [name for name in expected if name not in arrays]:
        raise ArtifactError(f"arrays.{missing[0]} is missing")
    if unknown := [name for name in arrays if name not in expected]:
        raise ArtifactError(f"arrays.{ascii(unknown[0])[:60]}: no such array in this model")
    return {name: from_json(expected[name], arrays[name], f"arrays.{name}") for name in expected}


def _check_place(name: str, place: Place, records: RecordFormat, file_bytes: int) -> None:
    for field, offset, size in place.extents(records):
        if offset % ALIGN_BYTES or offset + size > file_bytes:
            raise ArtifactError(
                f"{name}.{field} = {offset}: expected a multiple of {ALIGN_BYTES}, with {size} "
                f"bytes after it in a file of {file_bytes}"
            )


def _check_mlp(name: str, place: MlpPlace, form: RecordFormat) -> None:
    if place.ffn_width != form.ffn_width:
        raise ArtifactError(f"{name}.ffn_width = {place.ffn_width}: expected {form.ffn_width}")


def _layer_of(name: str) -> int:
    return int(name.split(".")[1])
