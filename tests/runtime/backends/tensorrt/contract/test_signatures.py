"""The emulator has the members, the parameters and the constants of the real modules.

TensorRT-RTX is installed with the tests. The bindings of full TensorRT come from wheels, pinned by
hash, with stub libraries. This compares names; `test_behaviour.py` tests behaviour on a machine
with a GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deeptalk_edge.runtime.backends.tensorrt.flavour import FLAVOURS
from tests.runtime.backends.tensorrt import emulated_tensorrt
from tests.runtime.backends.tensorrt.contract.stand_in import make_stand_ins

USED = {
    "Runtime": ["deserialize_cuda_engine"],
    "ICudaEngine": [
        "num_io_tensors",
        "num_optimization_profiles",
        "device_memory_size_v2",
        "get_tensor_name",
        "get_tensor_mode",
        "get_tensor_dtype",
        "get_tensor_shape",
        "get_tensor_profile_shape",
        "create_execution_context",
    ],
    "IExecutionContext": [
        "set_device_memory",
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "execute_async_v3",
    ],
    "TensorIOMode": [],
    "DataType": [],
    "ExecutionContextAllocationStrategy": [],
}
"""Members that we use, in both flavours; an enumeration has no list."""

OF_RTX = {
    "ICudaEngine": ["create_runtime_config"],
    "IExecutionContext": ["is_stream_capturable"],
    "IRuntimeConfig": [
        "cuda_graph_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "set_execution_context_allocation_strategy",
        "create_runtime_cache",
        "set_runtime_cache",
    ],
    "IRuntimeCache": ["serialize", "deserialize"],
    "CudaGraphStrategy": [],
    "DynamicShapesKernelSpecializationStrategy": [],
}

WHEELS = {
    ("tensorrt-cu12-bindings", "10.3.0"): (
        "59ace22d7f2ca1e9dcde2cb0cb5916912cb3cd5a9d72dd7852be0160d9b3a0ee"
    ),
    ("tensorrt-cu12-bindings", "10.13.3.9"): (
        "33aa9d104c04b008871645a97bd8a1a02279cf498d251df5e767d9d5183e0646"
    ),
    ("tensorrt-cu13-bindings", "10.13.3.9"): (
        "f40c9e488af125b232fcca85ac4b21e090d7b1be55c3062eeaf48c2a9a9ed808"
    ),
    ("tensorrt-cu13-bindings", "10.16.1.11"): (
        "f986d47980d042cc126506a9b84586e55ad13737a7a46826fe45457c04d66294"
    ),
    ("tensorrt-cu13-bindings", "11.0.0.114"): (
        "af42b7a12813d4615e1a3c7defea86d5223b902f6f209abe540d822d94eb2da7"
    ),
    ("tensorrt-cu12-bindings", "11.4.0.106"): (
        "e2ab48f316bbff6a7a44a30e94a9ceb0d2cf6645ff39feadecfa68d7cb7a94bf"
    ),
    ("tensorrt-cu13-bindings", "11.4.0.106"): (
        "d072ac2a095e2be749fefc847adfb25d5ebe70303401df62ede8fe67a59f27fc"
    ),
}
"""SHA-256 of each wheel of full TensorRT's bindings, for CPython 3.11 on x86-64."""

IN_CI = [("tensorrt-cu12-bindings", "10.3.0"), ("tensorrt-cu13-bindings", "10.16.1.11")]
"""Versions of JetPack 6 and JetPack 7.2."""


def test_the_emulated_rtx_matches_the_installed_module() -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("no tensorrt_rtx in this environment: pip install '.[tensorrt-rtx]'")
    members = {kind: [*USED.get(kind, []), *OF_RTX.get(kind, [])] for kind in {**USED, **OF_RTX}}
    said = signatures("tensorrt_rtx", members)
    check(said)
    assert said["version"].startswith(FLAVOURS["tensorrt_rtx"].series)


@pytest.mark.parametrize("wheel", IN_CI)
def test_the_emulated_tensorrt_matches_that_of_jetsons(
    wheel: tuple[str, str], tmp_path: Path
) -> None:
    check_wheel(wheel, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("wheel", WHEELS.keys() - {*IN_CI})
def test_the_emulated_tensorrt_matches_every_other_version(
    wheel: tuple[str, str], tmp_path: Path
) -> None:
    check_wheel(wheel, tmp_path)


def check_wheel(wheel: tuple[str, str], place: Path) -> None:
    """Skips if the wheel cannot be used: another interpreter, no registry, no compiler."""
    if sys.version_info[:2] != (3, 11) or sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("the wheels pinned here are for CPython 3.11 on x86-64")
    for tool in ("gcc", "objdump", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine: no stand-ins for TensorRT's libraries")
    name, version = wheel
    requirements = place / "requirements.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{WHEELS[wheel]}\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "-d", str(place), "-r", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        assert "hash" not in done.stderr.lower(), done.stderr
        pytest.skip(f"{name} {version} cannot be downloaded here")
    with zipfile.ZipFile(next(place.glob("*.whl"))) as archive:
        archive.extractall(place)
    make_stand_ins(next(place.glob("*/tensorrt.so")), place / "libraries")
    said = signatures(
        "tensorrt_bindings", USED, PYTHONPATH=str(place), LD_LIBRARY_PATH=str(place / "libraries")
    )
    check(said)
    assert said["version"].startswith(FLAVOURS["tensorrt"].series)


def ours(kind: str, name: str) -> Any:
    """The emulator's parameters, or "property"."""
    member = getattr(getattr(emulated_tensorrt, kind), name, None)
    if not inspect.isfunction(member):
        return "property"
    return [p for p in inspect.signature(member).parameters if p != "self"]


def check(said: dict[str, Any]) -> None:
    for member, theirs in said["members"].items():
        assert theirs is not None, f"{said['version']}: {member} is missing"
        kind, name = member.split(".")
        mine = ours(kind, name)
        if "property" in (theirs, mine):
            assert theirs == mine, f"{said['version']}: {member}: ours {mine}, theirs {theirs}"
            continue
        fits = [[*names] for names in theirs if names[: len(mine)] == mine]
        assert fits, f"{said['version']}: {member}: ours {mine}, theirs {theirs}"
    for kind, theirs in said["enums"].items():
        for value in getattr(emulated_tensorrt, kind):
            assert theirs.get(value.name) == int(value), f"{kind}.{value.name}: {theirs}"


def signatures(module: str, members: dict[str, list[str]], **env: str) -> dict[str, Any]:
    program = Path(__file__).with_name("signatures.py")
    done = subprocess.run(
        [sys.executable, str(program), module, json.dumps(members)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **env},
    )
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said
