"""Bundles of the tiny checkpoint with emulated engines; each is made once, at its first use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deeptalk_edge.bench.gpu.moe_library import MoeLibrary
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from tests.places import TINY
from tests.plugin import built_for_host
from tests.runtime.backends.tensorrt import emulated_tensorrt
from tests.runtime.backends.tensorrt.drill import write_drill_checkpoint
from tests.runtime.backends.tensorrt.emulated_cuda import EmulatedCuda
from tests.runtime.backends.tensorrt.emulation import (
    build_plugin,
    export_engines,
    gpu,
    profile,
    tensorrt_module,
)


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Float32, the experts in operators, the prompt row by row. Never write to it."""
    return export_engines(tmp_path_factory.mktemp("exact"), profile("operators", "float32"))


@pytest.fixture(scope="session")
def _plugin_kernels() -> None:
    """The plugin's own kernels, built for the host, for the emulator."""
    emulated_tensorrt.moe_library = MoeLibrary(built_for_host())


@pytest.fixture(scope="session")
def small(_plugin_kernels: None, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Float16, int8 experts in the plugin's own kernels, 256 rows of a prompt at once."""
    place = tmp_path_factory.mktemp("small")
    return export_engines(place, profile("plugin", "float16"), build_plugin(place / "plugin"))


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same checkpoint for ONNX Runtime, float32."""
    place = tmp_path_factory.mktemp("on_cpu") / "bundle"
    export_bundle(TINY, place, ExportSettings())
    return Bundle.open(place)


@pytest.fixture(scope="session")
def drill_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("drill") / "checkpoint"
    write_drill_checkpoint(place)
    return place


@pytest.fixture(scope="session")
def drill_on_cpu(drill_checkpoint: Path) -> Bundle:
    place = drill_checkpoint.parent / "cpu"
    export_bundle(drill_checkpoint, place, ExportSettings())
    return Bundle.open(place)


@pytest.fixture(scope="session")
def drill_exact(drill_checkpoint: Path) -> Bundle:
    """Float32, in operators."""
    place = drill_checkpoint.parent / "exact"
    return export_engines(place, profile("operators", "float32"), checkpoint=drill_checkpoint)


@pytest.fixture(scope="session")
def drill_small(drill_checkpoint: Path, _plugin_kernels: None) -> Bundle:
    """Float16 and int8, in the plugin."""
    place = drill_checkpoint.parent / "small"
    plugin, form = build_plugin(place / "plugin"), profile("plugin", "float16")
    return export_engines(place, form, plugin, checkpoint=drill_checkpoint)


@pytest.fixture
def cuda(tmp_path: Path) -> Iterator[EmulatedCuda]:
    """An emulated GPU with late streams and TensorRT; tests must release everything."""
    with tensorrt_module(tmp_path), gpu() as emulated:
        yield emulated
        assert emulated.is_clean
