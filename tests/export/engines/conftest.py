"""Real TensorRT-RTX builds: no GPU is needed, only the package of the extra `tensorrt-rtx`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.plugin import built_plugin


@pytest.fixture(scope="session", autouse=True)
def _tensorrt_rtx() -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("no tensorrt_rtx in this environment: pip install '.[tensorrt-rtx]'")


@pytest.fixture(scope="session")
def plugin() -> Path:
    return built_plugin()


@pytest.fixture
def full_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `tensorrt` of version 10.16.2.1 that wraps TensorRT-RTX.

    Full TensorRT comes only with a Jetson. The builder's code is the same for both, so this tests
    all of it except full TensorRT itself.
    """
    module = tmp_path / "modules" / "tensorrt"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(
        'from tensorrt_rtx import *\n__version__ = "10.16.2.1"\n', encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(module.parent))
    monkeypatch.setenv("PYTHONPATH", str(module.parent), prepend=os.pathsep)
    libraries = importlib.util.find_spec("tensorrt_rtx_libs")
    assert libraries is not None
    assert libraries.submodule_search_locations is not None
    for library in Path(libraries.submodule_search_locations[0]).glob("lib*.so.1"):
        (module.parent / library.stem).symlink_to(library)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(module.parent))
    return module
