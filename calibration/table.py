"""The calibration table, a directory that `calibrate` writes and `export --table` reads.

    table.json     the header: checkpoint, method, precision by layer, coverage, gate, files
    experts.bin    every routed expert as a record, quantised: what was measured is what is exported
    folds.npz      channel scales folded into the layers before, and fitted routers (folds.py)
    routing.npz    popularity and succession for the pager, tokens by expert
    report.html    the same for a person; report.json for a program

Every file but the header is named in it with its size and hash. The header carries the hash of the
checkpoint's weights: `export` refuses another's table.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.arrays import Form, read_arrays
from deeptalk_edge.bundle.calibration import Calibration
from deeptalk_edge.bundle.expert_record import (
    PAGE_BYTES,
    ExpertForm,
    ExpertRecord,
    ExpertWeights,
    RecordFormat,
)
from deeptalk_edge.bundle.manifest import FileEntry, FileName, Line, Origin
from deeptalk_edge.bundle.routing import ROUTING
from deeptalk_edge.calibration.folds import Folds, fold_shapes
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.files import check_file, sha256_of, write_file
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.schema import Between, from_json, read_json

FORMAT = 1
HEADER, RECORDS, FOLDS, REPORT, REPORT_JSON = (
    "table.json",
    "experts.bin",
    "folds.npz",
    "report.html",
    "report.json",
)
TABLE_FILES = (HEADER, RECORDS, FOLDS, ROUTING, REPORT, REPORT_JSON)

MethodName: TypeAlias = Literal["rtn", "mse", "awq", "gptq", "smoothquant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """`table.json`, but for its format."""

    producer: Line
    checkpoint: Origin
    device: Line
    """The profile that it was made for."""
    layers: Mapping[str, ExpertForm]
    """The precision of each layer's routed experts."""
    folded: Mapping[str, tuple[Annotated[int, Between(0, 1023)], ...]] = field(default_factory=dict)
    """Which layers have folded scales, by kind: `inputs`, `hidden`, `latents`; or `routers`."""
    records: tuple[ExpertRecord, ...]
    calibration: Calibration
    files: Mapping[FileName, FileEntry] = field(default_factory=dict)


class OpenTable:
    """A table on disk whose header is checked; records are checked when they are read."""

    def __init__(self, path: Path, table: Table, spec: ModelSpec) -> None:
        self.path, self.table, self._spec = path, table, spec
        self._records = {(r.layer, r.expert): r for r in table.records}
        self.folds = self._read_folds()

    @classmethod
    def open(cls, path: Path, spec: ModelSpec, checkpoint_sha256: str) -> OpenTable:
        """Open and check a table for this checkpoint.

        Raises ArtifactError if it is none, damaged, of another format, or another checkpoint's.
        """
        table = read_table(path)
        found = table.checkpoint
        if found.sha256 != checkpoint_sha256:
            raise ArtifactError(
                f"{path}: made for the checkpoint {found.name} ({found.sha256[:12]}...), this one "
                f"is {checkpoint_sha256[:12]}...; calibrate this checkpoint"
            )
        _check_records(path, table, spec)
        return cls(path, table, spec)

    def form(self, layer: int) -> RecordFormat:
        """How a layer's experts are held."""
        return record_form(self._spec, self.table.layers[str(layer)])

    def record(self, layer: int, expert: int) -> NDArray[np.uint8]:
        """One packed record, (record_bytes,).

        Raises ArtifactError if it is damaged.
        """
        entry, form = self._records[layer, expert], self.form(layer)
        with (self.path / RECORDS).open("rb") as file:
            file.seek(entry.offset)
            content = file.read(form.record_bytes)
        if len(content) != form.record_bytes or zlib.crc32(content[: entry.bytes]) != entry.crc32:
            raise ArtifactError(
                f"{self.path / RECORDS}: layer {layer}, expert {expert} is damaged; calibrate again"
            )
        return np.frombuffer(content, np.uint8)

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """One expert's integers and scales."""
        return self.form(layer).unpack(self.record(layer, expert))

    def _read_folds(self) -> Folds:
        decoder = self._spec.decoder
        sizes = fold_shapes(decoder)
        folded = {kind: layers for kind, layers in self.table.folded.items() if layers}
        if unknown := folded.keys() - sizes.keys():
            raise ArtifactError(f"{self.path}: folded.{min(unknown)}: no such kind of scales")
        if not folded:
            return Folds()
        forms: dict[str, Form] = {
            kind: (np.float32, (len(layers), *sizes[kind])) for kind, layers in folded.items()
        }
        arrays = read_arrays(self.path / FOLDS, forms)
        folds = Folds(
            **{k: dict(zip(layers, arrays[k], strict=True)) for k, layers in folded.items()}
        )
        folds.check(decoder)
        return folds


def record_form(spec: ModelSpec, form: ExpertForm) -> RecordFormat:
    """Raises ValueError if the model's widths do not allow it."""
    return RecordFormat(
        dtype=form.dtype,
        group=form.group,
        width=spec.decoder.width,
        ffn_width=spec.decoder.expert_ffn_width,
    )


def read_table(path: Path) -> Table:
    """The header of a table whose files are whole; experts.bin is checked record by record.

    Raises ArtifactError if it is none, damaged or of another format.
    """
    place = path / HEADER
    if not place.is_file():
        raise ArtifactError(f"{path}: no calibration table; make one with deeptalk-edge calibrate")
    content = read_json(place)
    found = content.pop("format", None)
    if type(found) is not int or found != FORMAT:
        raise ArtifactError(
            f"{place}: format {str(found)[:40]}, this version reads {FORMAT}; calibrate again"
        )
    try:
        table = from_json(Table, content)
    except (ArtifactError, ValueError) as error:
        raise ArtifactError(f"{place}: {error}; calibrate again") from error
    if strange := table.files.keys() - set(TABLE_FILES):
        raise ArtifactError(f"{place}: files: {min(strange)[:60]!r} is no file of a table")
    for name, entry in table.files.items():
        sha256 = None if name == RECORDS else entry.sha256
        check_file(path / name, size_bytes=entry.bytes, sha256=sha256)
    return table


def write_table(table: Table, directory: Path) -> Table:
    """Write the header, with every other file of the table that is there; returns it as written."""
    files = {
        name: FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
        for name in TABLE_FILES
        if name != HEADER and (path := directory / name).is_file()
    }
    table = dataclasses.replace(table, files=files)
    content = {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(table)))}
    write_file(directory / HEADER, (json.dumps(content, indent=1) + "\n").encode())
    return table


def save_folds(folds: Folds, directory: Path) -> dict[str, tuple[int, ...]]:
    """Write folds.npz; returns what the header says of it."""
    kinds = {each.name: getattr(folds, each.name) for each in dataclasses.fields(folds)}
    arrays = {
        kind: np.stack([scales[k] for k in sorted(scales)])
        for kind, scales in kinds.items()
        if scales
    }
    if arrays:
        np.savez(directory / FOLDS, allow_pickle=False, **arrays)
    return {kind: tuple(sorted(scales)) for kind, scales in kinds.items() if scales}


def _check_records(path: Path, table: Table, spec: ModelSpec) -> None:
    decoder = spec.decoder
    if table.layers.keys() != {str(layer) for layer in decoder.moe_layers}:
        raise ArtifactError(f"{path}: layers: expected one entry for each layer of experts")
    expected = {(layer, e) for layer in decoder.moe_layers for e in range(decoder.num_experts)}
    if {(r.layer, r.expert) for r in table.records} != expected or len(table.records) != len(
        expected
    ):
        raise ArtifactError(f"{path}: records: expected one for each of {len(expected)} experts")
    for record in table.records:
        try:
            form = record_form(spec, table.layers[str(record.layer)])
        except ValueError as error:
            raise ArtifactError(f"{path}: layers.{record.layer}: {error}") from error
        if record.bytes != form.content_bytes or record.offset % PAGE_BYTES:
            raise ArtifactError(
                f"{path}: layer {record.layer}, expert {record.expert}: {record.bytes} bytes at "
                f"{record.offset}, expected {form.content_bytes} on a page; calibrate again"
            )
