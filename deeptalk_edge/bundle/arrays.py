"""Arrays out of an .npz file of a bundle: what the file claims is checked before a byte of it.

A form is a dtype and a shape; a named size is free, but the same wherever its name occurs:

    {"rows": (np.int64, (1, "T", 8)), "audio_mask": (np.bool_, ("T",))}
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import ArtifactError

Form: TypeAlias = tuple[type[np.generic], tuple[int | str, ...]]

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_arrays(path: Path, forms: Mapping[str, Form]) -> dict[str, NDArray[Any]]:
    """Read the arrays that `forms` names; others are left alone.

    Raises ArtifactError if the file is no .npz, lacks an array, or one has another form.
    """
    sizes: dict[str, int] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = {entry.filename for entry in archive.infolist()}
            if missing := sorted(name for name in forms if f"{name}.npy" not in names):
                raise ArtifactError(f"{', '.join(missing)} missing")
            return {name: _read(archive, name, form, sizes) for name, form in forms.items()}
    except Exception as error:  # numpy, zipfile, zlib and struct share no base
        reason = str(error) if isinstance(error, ArtifactError) else f"not readable ({error})"
        raise ArtifactError(f"{path}: {reason}; export the bundle again") from error


def _read(archive: zipfile.ZipFile, name: str, form: Form, sizes: dict[str, int]) -> NDArray[Any]:
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as file:
        shape, dtype = _header(file)
    expected = np.dtype(form[0]).newbyteorder("<")
    if dtype != expected or not _fits(shape, form[1], sizes):
        wanted = ", ".join(str(sizes.get(str(size), size)) for size in form[1])
        raise ArtifactError(f"{name} is {dtype} {shape}, expected {expected} ({wanted})")
    if math.prod(shape) * dtype.itemsize > entry.file_size:
        raise ArtifactError(f"{name} claims {shape}, its entry has {entry.file_size} bytes")
    with archive.open(entry) as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    shape, _, dtype = _HEADERS[version](file)
    return shape, dtype


def _fits(shape: tuple[int, ...], form: tuple[int | str, ...], sizes: dict[str, int]) -> bool:
    if len(shape) != len(form):
        return False
    for found, size in zip(shape, form, strict=True):
        expected = size if isinstance(size, int) else sizes.setdefault(size, found)
        if found != expected:
            return False
    return True
