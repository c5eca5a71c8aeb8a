"""Engines by torch, as in tier 2 of the GPU check, compared with ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from deeptalk_edge.bench.gpu.torch_program import TorchProgram
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from tests.runtime.backends.tensorrt.drill import SPEC, write_drill_checkpoint
from tests.runtime.backends.tensorrt.emulation import profile

SIZES = {"B": 2, "T": 1, "A": 4, "S": 64}
NUMPY: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
    "tensor(int8)": np.int8,
}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs that engines are built from, in float32 and operators."""
    place = tmp_path_factory.mktemp("graphs")
    write_drill_checkpoint(place / "checkpoint")
    form = profile("operators", "float32")
    export_bundle(place / "checkpoint", place / "bundle", ExportSettings(profile=form))
    return place / "bundle"


@pytest.mark.parametrize("name", ["encoder", "embed", "step_native", "head", "codec"])
def test_torch_computes_what_onnx_runtime_does(name: str, graphs: Path) -> None:
    session = onnxruntime.InferenceSession(graphs / f"{name}.onnx")
    random = np.random.default_rng(3)
    feeds = {value.name: fed(value, random) for value in session.get_inputs()}
    outputs = [value.name for value in session.get_outputs()]
    expected = dict(zip(outputs, session.run(None, feeds), strict=True))
    program = TorchProgram(onnx.load(graphs / f"{name}.onnx"), "cpu", no_plugin)
    found = program.run({n: torch.from_numpy(np.array(array)) for n, array in feeds.items()})
    for output, right in expected.items():
        scale = float(np.abs(right.astype(np.float64)).max()) or 1.0
        assert np.abs(found[output].numpy().astype(np.float64) - right).max() / scale < 1e-5


def fed(value: Any, random: np.random.Generator) -> NDArray[Any]:
    shape = [
        d if isinstance(d, int) else SIZES.get(d, 8 if "slot" in d else 64) for d in value.shape
    ]
    dtype = NUMPY[value.type]
    if value.name == "positions":
        return np.array([30], np.int32)
    if value.name in ("position", "length"):
        return np.array({"position": 3, "length": 1 << 40}[value.name], np.int64)
    if value.name.startswith("slot_table"):
        return random.permutation(shape[0]).astype(np.int32)
    if np.issubdtype(dtype, np.floating):
        return (random.standard_normal(shape) / 8).astype(dtype)
    return (random.integers(0, 2 if dtype is np.bool_ else 30, shape)).astype(dtype)


def no_plugin(a: Any, given: Any) -> Any:
    raise AssertionError("operators need no plugin")


def test_a_step_in_float16_is_near(graphs: Path, tmp_path: Path) -> None:
    form = profile("operators", "float16")
    checkpoint = graphs.parent / "checkpoint"
    export_bundle(checkpoint, tmp_path / "bundle", ExportSettings(profile=form))
    assert Bundle.open(tmp_path / "bundle").manifest.precision["kv_cache"] == "float16"
    model = onnx.load(tmp_path / "bundle/head.onnx")
    hidden = np.random.default_rng(4).standard_normal((2, 64)).astype(np.float32)
    table = np.fromfile(tmp_path / "bundle/embedding.bin", np.float16).reshape(-1, 64)[
        : SPEC.vocabulary.size
    ]
    program = TorchProgram(model, "cpu", no_plugin)
    found = program.run({"hidden": torch.from_numpy(hidden), "table": torch.from_numpy(table)})
    right = hidden.astype(np.float16).astype(np.float32) @ table.astype(np.float32).T
    text = right[:, : found["text_logits"].shape[1]]
    assert np.abs(found["text_logits"].numpy() - text).max() / np.abs(text).max() < 4e-3
