"""The claimed sizes of an .npz are checked before it is read: a hostile one takes no memory."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.arrays import Form, read_arrays
from deeptalk_edge.errors import ArtifactError

FORMS: dict[str, Form] = {"rows": (np.int64, (1, "T", 3)), "mask": (np.bool_, ("T",))}


def save(path: Path, **arrays: NDArray[Any]) -> Path:
    whole = {"rows": np.zeros((1, 5, 3), np.int64), "mask": np.ones(5, np.bool_)}
    np.savez(path, **(whole | arrays))
    return path


def test_arrays_of_the_right_form_are_read_and_others_left(tmp_path: Path) -> None:
    found = read_arrays(save(tmp_path / "a.npz", other=np.zeros(2)), FORMS)
    assert found.keys() == FORMS.keys()
    assert found["mask"].all()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"rows": np.zeros((1, 5, 3), np.int32)}, r"rows is int32 \(1, 5, 3\), expected int64"),
        ({"rows": np.zeros((1, 5, 4), np.int64)}, r"rows is int64 \(1, 5, 4\), expected int64"),
        ({"mask": np.ones(4, np.bool_)}, r"mask is bool \(4,\), expected bool \(5\)"),
        ({"mask": np.ones((5, 1), np.bool_)}, r"mask is bool \(5, 1\), expected bool \(5\)"),
        ({"mask": np.array([{}] * 5, object)}, "mask is object"),
    ],
)
def test_another_form_is_named(
    tmp_path: Path,
    arrays: dict[str, NDArray[Any]],
    message: str,
) -> None:
    with pytest.raises(ArtifactError, match=rf"a\.npz: {message}.*export the bundle again"):
        read_arrays(save(tmp_path / "a.npz", **arrays), FORMS)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04" + bytes(60)])
def test_a_file_that_is_no_archive_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a\.npz: not readable \(.*export the bundle again"):
        read_arrays(tmp_path / "a.npz", FORMS)


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", rows=np.zeros((1, 5, 3), np.int64))
    with pytest.raises(ArtifactError, match="mask missing"):
        read_arrays(tmp_path / "a.npz", FORMS)


def test_an_array_larger_than_its_entry_is_not_allocated(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = {"descr": "<i8", "fortran_order": False, "shape": (1, 10**12, 3)}
    np.lib.format.write_array_header_1_0(header, shape)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("rows.npy", header.getvalue())
    with pytest.raises(ArtifactError, match=r"rows claims \(1, 1000000000000, 3\), its entry has"):
        read_arrays(tmp_path / "a.npz", {"rows": FORMS["rows"]})
