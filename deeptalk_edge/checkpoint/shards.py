"""The tensors of a directory of safetensors: headers at once, a tensor's bytes when needed.

Source: the safetensors format; Hugging Face's `model.safetensors.index.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # gives numpy the bfloat16 that safetensors asks it for
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.schema import read_json

Array = NDArray[np.float32]
Shape = tuple[int, ...]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The tensors of a directory of safetensors, by the names under which they are stored."""

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    """In safetensors' words: `F16`, `BF16`, ..."""

    _shards: Mapping[str, _Shard]

    @classmethod
    def open(cls, directory: Path) -> Weights:
        """Read the headers of all shards.

        Raises ArtifactError if a shard is missing or damaged.
        """
        shapes: dict[str, Shape] = {}
        dtypes: dict[str, str] = {}
        shards: dict[str, _Shard] = {}
        for path in _shard_paths(directory):
            shard = _Shard(path)
            for name, shape, dtype in shard.entries():
                shapes[name], dtypes[name], shards[name] = shape, dtype, shard
        return cls(shapes=shapes, dtypes=dtypes, _shards=shards)

    def tensor(self, name: str) -> Array:
        """A stored tensor as float32."""
        return self._shards[name].tensor(name)

    def file_of(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return self._shards[name].name

    def rows(self, name: str, start: int, stop: int) -> Array:
        """The rows from `start` to `stop`, or to the tensor's end, as float32."""
        return self._shards[name].rows(name, start, min(stop, self.shapes[name][0]))


class _Shard:
    """One safetensors file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: Any = safe_open(path, framework="np")
        except FileNotFoundError:
            raise ArtifactError(f"{path}: no such shard; download the checkpoint again") from None
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from error

    @property
    def name(self) -> str:
        return self._path.name

    def entries(self) -> Iterator[tuple[str, Shape, str]]:
        """Name, shape and dtype of every tensor, from the header."""
        for name in self._file.keys():  # noqa: SIM118  # safe_open is no mapping
            header = self._file.get_slice(name)
            yield name, tuple(header.get_shape()), header.get_dtype()

    def tensor(self, name: str) -> Array:
        try:
            stored = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from error
        return np.asarray(stored, np.float32)

    def rows(self, name: str, start: int, stop: int) -> Array:
        try:
            stored = self._file.get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from error
        return np.asarray(stored, np.float32)

    def _damaged(self, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"{self._path}: truncated or damaged ({error}); download the checkpoint again"
        )


def _shard_paths(directory: Path) -> list[Path]:
    index = directory / INDEX
    if not index.is_file():
        if not (directory / WEIGHTS).is_file():
            raise ArtifactError(
                f"{directory}: holds neither {INDEX} nor {WEIGHTS}; "
                "convert weights of another format to safetensors"
            )
        return [directory / WEIGHTS]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{index}: expected a weight_map of tensors, found {weight_map!r:.40}")
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ArtifactError(
            f"{index}: the shard {outside[0]!r} is not a file in the index's folder"
        )
    return [directory / name for name in names]
