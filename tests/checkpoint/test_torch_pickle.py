"""The restricted torch reader against torch.save."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deeptalk_edge.checkpoint.torch_pickle import TorchFile
from deeptalk_edge.errors import ArtifactError


def test_every_tensor_of_a_state_dict_is_read(tmp_path: Path) -> None:
    base = torch.randn(6, 8)
    tensors = {
        "plain": torch.randn(3, 4, 5),
        "half": torch.randn(7).half(),
        "bfloat16": torch.randn(9).bfloat16(),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "a view": base[1:4, 2:5],
        "transposed": base.T,
    }
    torch.save(tensors, tmp_path / "weights.bin")
    file = TorchFile(tmp_path / "weights.bin")
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(file.tensor(name), tensor.float().numpy())


def test_a_modules_state_dict_is_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "weights.bin")
    file = TorchFile(tmp_path / "weights.bin")
    np.testing.assert_array_equal(file.tensor("bias"), module.bias.detach().numpy())


class _Touches:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def test_a_file_that_names_a_function_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1), "extra": _Touches(tmp_path / "ran")}, tmp_path / "w.bin")
    with pytest.raises(ArtifactError, match="it names"):
        TorchFile(tmp_path / "w.bin")
    assert not (tmp_path / "ran").exists()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(100)}, tmp_path / "whole.bin")
    with (
        zipfile.ZipFile(tmp_path / "whole.bin") as whole,
        zipfile.ZipFile(tmp_path / "cut.bin", "w") as cut,
    ):
        for name in whole.namelist():
            content = whole.read(name)
            cut.writestr(name, content[:40] if name.endswith("/data/0") else content)
    with pytest.raises(ArtifactError, match="reaches beyond its storage"):
        TorchFile(tmp_path / "cut.bin").tensor("weight")


@pytest.mark.parametrize(
    "layout",
    [(0, (10,), (-1,)), (-1, (10,), (1,)), (95, (10,), (1,)), (0, (11, 10), (10, 1))],
    ids=["backwards", "before", "after", "too many"],
)
def test_no_tensor_description_reads_beyond_its_storage(layout: Any, tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    torch.save({"weight": torch.zeros(100)}, path)
    file = TorchFile(path)
    offset, shape, strides = layout
    file._tensors["weight"] = replace(
        file._tensors["weight"], offset=offset, shape=shape, strides=strides
    )
    with pytest.raises(ArtifactError, match="reaches beyond its storage"):
        file.tensor("weight")


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 not a zip", b"\x80\x02}q\x00."], ids=["empty", "zip", "pickle"]
)
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(content)
    with pytest.raises(ArtifactError, match="not a torch file"):
        TorchFile(tmp_path / "weights.bin")


def test_a_file_that_holds_more_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"step": 3}, tmp_path / "weights.bin")
    with pytest.raises(ArtifactError, match="not one flat state dict"):
        TorchFile(tmp_path / "weights.bin")
