"""Reads the tensors of a torch checkpoint without torch, and without running its code.

Such a file is a zip: `*/data.pkl` describes the tensors, `*/data/<key>` holds their bytes. A pickle
can name any function to be called, so only what rebuilds a tensor is admitted.

Source: torch `serialization.py`, `_utils.py: _rebuild_tensor_v2`.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import ArtifactError

_DTYPES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype("<f8"),
}

# What a zip or a pickle of rubbish may raise, by their documentation.
_DAMAGED = (
    *(OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(pickle.UnpicklingError, zipfile.BadZipFile),
)


@dataclass(frozen=True, slots=True)
class _StorageKind:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    key: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor as the pickle describes it; strides and offset count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """The state dict of a torch file; a tensor's bytes are read when they are needed."""

    def __init__(self, path: Path) -> None:
        """Read the description.

        Raises ArtifactError if the file is damaged, of the old format, or holds more than tensors.
        """
        self._path = path
        try:
            with zipfile.ZipFile(path) as archive:
                [description] = [n for n in archive.namelist() if n.endswith("/data.pkl")]
                with archive.open(description) as file:
                    content = _TensorUnpickler(file).load()
        except _DAMAGED as error:
            raise self._refused(error) from error
        if not isinstance(content, Mapping) or not all(
            isinstance(tensor, _Tensor) for tensor in content.values()
        ):
            raise self._refused("it is not one flat state dict of tensors")
        self._folder = description.removesuffix("data.pkl")
        self._tensors: dict[str, _Tensor] = dict(content)
        self.shapes: Mapping[str, tuple[int, ...]] = {n: t.shape for n, t in self._tensors.items()}

    def tensor(self, name: str) -> NDArray[np.float32]:
        """A tensor by name, float32; the caller owns the array.

        Raises ArtifactError if its bytes are missing or too few.
        """
        described = self._tensors[name]
        dtype = _DTYPES[described.storage.kind]
        try:
            with zipfile.ZipFile(self._path) as archive:
                content = archive.read(f"{self._folder}data/{described.storage.key}")
        except _DAMAGED as error:
            raise self._refused(error) from error
        elements = np.frombuffer(content, dtype)
        if not _lies_within(described, elements.size):
            raise self._refused(f"{name} reaches beyond its storage")
        view = np.lib.stride_tricks.as_strided(
            elements[described.offset :],
            described.shape,
            [stride * dtype.itemsize for stride in described.strides],
        )
        return np.array(view, np.float32)

    def _refused(self, reason: object) -> ArtifactError:
        return ArtifactError(
            f"{self._path}: not a torch file that we read ({reason}); convert it to safetensors"
        )


class _TensorUnpickler(pickle.Unpickler):
    """Admits the names that rebuild tensors and nothing else."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _StorageKind(name)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        tag, kind, key, *_ = pid
        if tag != "storage" or not isinstance(kind, _StorageKind):
            raise pickle.UnpicklingError(f"it refers to {pid!r}")
        return _Storage(kind.name, str(key))


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> _Tensor:
    return _Tensor(storage, int(offset), tuple(shape), tuple(strides))


def _lies_within(tensor: _Tensor, num_elements: int) -> bool:
    if min(tensor.offset, *tensor.shape, *tensor.strides, 0) < 0:
        return False
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    return 0 in tensor.shape or tensor.offset + last < num_elements
