"""`native.json` is read as it was written, and invalid content is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.bundle.native_index import (
    ALIGN_BYTES,
    MatrixPlace,
    MlpPlace,
    Place,
    VectorPlace,
    expected_arrays,
    own_mlp_form,
    own_records,
    read_native_index,
    write_native_index,
)
from deeptalk_edge.errors import ArtifactError
from tests.specs import PLAIN

RECORDS = RecordFormat(dtype="int4", group=32, width=64, ffn_width=32)
OWN = own_records(RECORDS)


def laid_out() -> tuple[dict[str, Place], int]:
    """Consecutive places of all arrays, and the end of the last one."""
    places: dict[str, Place] = {}
    end = 0
    for name, kind in expected_arrays(PLAIN).items():
        start, later = end, end + 4096
        if kind is VectorPlace:
            places[name] = VectorPlace(offset=start, size=24)
        elif kind is MatrixPlace:
            matrix = {"rows": 10, "columns": 64, "group": 32}
            places[name] = MatrixPlace(offset=start, scales_offset=later, **matrix)
        else:
            form = own_mlp_form(PLAIN.decoder, int(name.split(".")[1]), OWN)
            places[name] = MlpPlace(offset=start, ffn_width=form.ffn_width)
        extents = list(places[name].extents(OWN))
        end = -(-max(offset + size for _, offset, size in extents) // ALIGN_BYTES) * ALIGN_BYTES
    return places, max(offset + size for _, offset, size in extents)


PLACES, FILE_BYTES = laid_out()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_native_index(tmp_path / "native.json", RECORDS, PLAIN, PLACES)
    return tmp_path / "native.json"


def read(path: Path, file_bytes: int = FILE_BYTES) -> dict[str, Place]:
    return read_native_index(path, RECORDS, PLAIN, file_bytes)[0]


def test_a_written_index_reads_back_equal(path: Path) -> None:
    assert read(path) == PLACES


def test_an_array_that_ends_a_byte_after_the_file_is_refused(path: Path) -> None:
    last = list(PLACES)[-1]
    with pytest.raises(ArtifactError, match=rf"native\.json: arrays\.{last}\.offset = "):
        read(path, FILE_BYTES - 1)


NESTED: Any = [[[[1]]]]
HOSTILE = [-1, 10**12, 10**15, 10**30, 1.5, "x", "", None, True, [], {}, NESTED, {"offset": 0}]


def edit(path: Path, name: str, field: str | None, value: object) -> None:
    content = json.loads(path.read_text())
    place = content["arrays"] if field is None else content["arrays"][name]
    place[field or name] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
@pytest.mark.parametrize(
    ("name", "field"),
    [
        *(("table", field) for field in ("offset", "scales_offset", "rows", "columns", "group")),
        *(("final_norm", field) for field in ("offset", "size")),
        *(("layers.2.mlp.1", field) for field in ("offset", "ffn_width")),
        *((name, None) for name in ("table", "final_norm", "layers.2.mlp.1")),
    ],
)
def test_an_impossible_field_is_refused_by_its_name(
    path: Path, name: str, field: str | None, value: object
) -> None:
    edit(path, name, field, value)
    with pytest.raises(ArtifactError, match=rf"native\.json: arrays\.{name}.*; export the bundle"):
        read(path)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("table", "group", 48, "group = 48: expected 0 or one of"),
        ("table", "group", 128, "columns = 64: expected whole groups of 128"),
        ("table", "rows", 0, r"rows = 0: expected 1 to"),
        ("table", "offset", 4, "offset = 4: expected a multiple of 64"),
        ("table", "scales_offset", FILE_BYTES // 64 * 64, "scales_offset = "),
        ("layers.0.mlp.0", "ffn_width", 32, "ffn_width = 32: expected 48"),
        ("layers.1.mlp.0", "ffn_width", 64, "ffn_width = 64: expected 32"),
    ],
)
def test_an_entry_that_contradicts_itself_the_file_or_the_model_is_refused(
    path: Path, name: str, field: str, value: int, message: str
) -> None:
    edit(path, name, field, value)
    with pytest.raises(ArtifactError, match=rf"native\.json: arrays\.{name}.*{message}"):
        read(path)


def test_arrays_that_the_model_lacks_or_that_are_missing_are_refused(path: Path) -> None:
    content = json.loads(path.read_text())
    content["arrays"]["layers.1.mlp.2"] = content["arrays"]["layers.1.mlp.1"]
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"arrays\.'layers\.1\.mlp\.2': no such array"):
        read(path)
    del content["arrays"]["layers.1.mlp.2"], content["arrays"]["layers.1.mlp.1"]
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"arrays\.layers\.1\.mlp\.1 is missing"):
        read(path)


@pytest.mark.parametrize("arrays", [None, [], "x", 1], ids=repr)
def test_arrays_that_are_not_an_object_are_refused(path: Path, arrays: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"arrays": arrays}))
    with pytest.raises(ArtifactError, match=r"native\.json: arrays: expected an object"):
        read(path)


@pytest.mark.parametrize("value", [None, [], {}, "x", 1, {"dtype": "int4"}, {"dtype": 4}], ids=repr)
def test_an_impossible_form_of_experts_is_refused(path: Path, value: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"experts": value}))
    with pytest.raises(ArtifactError, match=r"native\.json: (experts|made for experts)"):
        read(path)


@pytest.mark.parametrize("form", [("int4", 64), ("int8", None)])
def test_weights_made_for_other_experts_are_refused(
    path: Path, form: tuple[str, int | None]
) -> None:
    content = json.loads(path.read_text())
    content["experts"] = dict(zip(("dtype", "group"), form, strict=True))
    path.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=rf"made for experts in {form[0]} with group {form[1]}"):
        read(path)


@pytest.mark.parametrize("value", [0, 2, True, 1.0, "1", None, [1], 10**30], ids=repr)
def test_another_format_is_refused(path: Path, value: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format": value}))
    with pytest.raises(ArtifactError, match=r"native\.json: format .*, this runtime reads 1"):
        read(path)


def test_deeply_nested_json_is_refused(path: Path) -> None:
    path.write_text('{"arrays": ' + "[" * 200_000)
    with pytest.raises(ArtifactError, match=r"native\.json: not readable as JSON"):
        read(path)
