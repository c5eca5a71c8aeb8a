"""The plugin in real TensorRT-RTX engines, built without a GPU.

Every build-time callback runs: creator, fields, shapes, types, workspace, serialising. `enqueue`
does not run without a card; test_moe_kernels.py tests the kernels that it calls.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deeptalk_edge.bundle.expert_record import ExpertDtype, RecordFormat
from deeptalk_edge.errors import BackendError
from deeptalk_edge.runtime.backends.tensorrt.plugin import check_plugin
from tests.plugin import built_plugin

pytestmark = pytest.mark.slow

Build = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def plugin() -> Path:
    return built_plugin()


@pytest.fixture(scope="session")
def build(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    for package in ("tensorrt_rtx", "onnx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package} in this environment: pip install tensorrt-rtx-cu13 onnx")
    # The parser opens the library by its short name, which the wheel lacks.
    links = tmp_path_factory.mktemp("links")
    libs = importlib.util.find_spec("tensorrt_rtx_libs")
    assert libs is not None
    assert libs.submodule_search_locations is not None
    for library in Path(libs.submodule_search_locations[0]).glob("lib*.so.1"):
        (links / library.stem).symlink_to(library)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(links)}

    def build(dtype: ExpertDtype, group: int | None, /, **changes: Any) -> dict[str, Any]:
        record_format = RecordFormat(dtype=dtype, group=group, width=2048, ffn_width=1408)
        case: dict[str, Any] = {
            "plugin": str(plugin),
            "targets": ["SM86", "SM89", "SM120"],
            "weight_dtype": dtype,
            "group": group or 0,
            "width": 2048,
            "ffn_width": 1408,
            "num_experts": 64,
            "top_k": 6,
            "carry": 0,
            "activation": "bfloat16" if dtype == "bfloat16" else "float16",
            "arena": "int32",
            "num_slots": 100,
            "arena_columns": record_format.record_bytes // 4,
        } | changes
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("rtx_child.py")), json.dumps(case)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return {**result, "said": "\n".join((*result["errors"], done.stderr))}

    return build


@pytest.mark.parametrize(
    ("dtype", "group", "activation"),
    [
        ("float16", None, "float16"),
        ("bfloat16", None, "bfloat16"),
        ("int8", None, "bfloat16"),
        ("int4", 64, "float16"),
        ("int4", 128, "bfloat16"),
    ],
)
@pytest.mark.parametrize("carry", [0, 1])
def test_every_precision_builds_into_an_engine_for_three_cards(
    build: Build, dtype: ExpertDtype, group: int | None, activation: str, carry: int
) -> None:
    result = build(dtype, group, activation=activation, carry=carry)
    assert 0 < result["bytes"] < 100_000, result["errors"]  # no expert in the plan


def test_an_arena_of_more_than_2_to_31_bytes_builds(build: Build) -> None:
    record_bytes = RecordFormat(dtype="int4", group=64, width=2048, ffn_width=1408).record_bytes
    result = build("int4", 64, arena="int64", num_slots=1664, arena_columns=record_bytes // 8)
    assert result["bytes"] > 0, result["errors"]


NO_FORMAT = "Failed to find any supported plugin"  # TensorRT's message when it refuses every type


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ids": "int64"}, NO_FORMAT),
        ({"weights": "float16"}, NO_FORMAT),
        ({"activation": "float"}, NO_FORMAT),
        ({"arena": "float16"}, NO_FORMAT),
        ({"arena": "int8", "arena_columns": 4_595_712}, NO_FORMAT),
        ({"arena": "uint8", "arena_columns": 4_595_712}, "UInt8"),
        ({"arena_columns": 4096}, NO_FORMAT),
        ({"top_k": 17}, "top_k: expected"),
        ({"group": 32}, "weights: expected"),
        ({"weight_dtype": "float32"}, "weights: expected"),
        ({"weight_dtype": "bfloat16", "group": 0}, NO_FORMAT),  # with activations in float16
        ({"width": 2000}, "width: expected"),
        ({"group": [64, 128]}, "group: expected one whole number of 32 bits"),
        ({"carry": 0.0}, "carry: expected one whole number of 32 bits"),
        ({"weight_dtype": "int4" * 9}, "weight_dtype: expected"),
        ({"carry": 2}, "carry: expected"),
    ],
    ids=str,
)
def test_a_wrong_type_shape_or_attribute_is_refused_at_build_time(
    build: Build, changes: dict[str, Any], said: str
) -> None:
    result = build("int4", 64, **changes)
    assert result["bytes"] == 0
    assert said in result["said"]


def test_the_plugin_links_no_tensorrt_and_no_shared_cuda(plugin: Path) -> None:
    needed = subprocess.run(
        ["readelf", "-d", str(plugin)], capture_output=True, text=True, check=True
    ).stdout
    assert "libnvinfer" not in needed
    assert "libcudart" not in needed


def test_the_plugin_says_for_which_gpus_it_was_built(plugin: Path) -> None:
    """The runtime reads this before TensorRT loads the plugin."""
    for gpu in ("sm_86", "sm_89", "sm_120"):  # machine code; for later ones there is PTX
        check_plugin(plugin, gpu)
    with pytest.raises(BackendError, match="holds code for sm 86, this GPU is sm_80"):
        check_plugin(plugin, "sm_80")
