"""Mistakes are planted in the source lines, one at a time; the drill detects each of them.

A patch that no longer applies fails, so the list stays up to date.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.runtime.settings import ConversationSettings
from tests.places import ROOT
from tests.runtime.backends.tensorrt.drill import Array, Drill
from tests.runtime.backends.tensorrt.emulated_cuda import Mode
from tests.runtime.backends.tensorrt.emulation import gpu, tensorrt_module

FOLDER = "runtime/backends/tensorrt"

MUTANTS: dict[str, tuple[str, str, str]] = {
    "the cache is not zeroed": (
        "cache.py",
        "self._cuda.begin_memset(block.pointer, 0, num_bytes, self._stream)",
        "pass",
    ),
    "a trim is off by one": (
        "cache.py",
        "self.num_rows = position",
        "self.num_rows = position + 1",
    ),
    "a trim does nothing": ("cache.py", "self.num_rows = position", "pass"),
    "new rows go to the largest size alone": (
        "cache.py",
        "if fitting > 0:",
        "if fitting > 0 and size == max(self._shape.sizes):",
    ),
    "new rows are one row late": (
        "cache.py",
        "block.place(0, self.num_rows), num_rows",
        "block.place(0, self.num_rows + 1), num_rows",
    ),
    "the dropped lane is not set aside": (
        "cache.py",
        "self._set_aside(1 - item, self._num_shared, self.num_rows)",
        "pass",
    ),
    "the kept lane is set aside": (
        "cache.py",
        "self._set_aside(1 - item, ",
        "self._set_aside(item, ",
    ),
    "the kept lane is not repeated": (
        "cache.py",
        "self._copy_rows(block, item, block, 1 - item, self._num_shared, self.num_rows)",
        "pass",
    ),
    "recall restores one lane": ("cache.py", "for lane in range(2):", "for lane in range(1):"),
    "recall forgets the rows": (
        "cache.py",
        "self.num_rows, self._dropped_rows, self._num_shared = self._dropped_rows, None, 0",
        "self._dropped_rows, self._num_shared = None, 0",
    ),
    "a trim before the fork loses rows of the dropped lane": (
        "cache.py",
        "self._set_aside(0, position, self._aside_from)",
        "pass",
    ),
    "a prompt reaches one lane": (
        "cache.py",
        "for lane in range(block.num_lanes):",
        "for lane in range(1):",
    ),
    "the smaller profile is used one row too long": (
        "engine.py",
        "if num_rows <= self.sizes[profile]",
        "if num_rows <= self.sizes[profile] + 1",
    ),
    "the smaller profile is bound to the larger cache": (
        "engine.py",
        "address = self._cache.address(kind, size, layer)",
        "address = self._cache.address(kind, max(self._plan.sizes), layer)",
    ),
    "a graph is captured without a first run": (
        "engine.py",
        "            self._enqueue_row(profile, with_head=with_head)\n"
        "            self._cuda.synchronize(self._stream)\n"
        "            if self._uses_graphs:",
        "            if self._uses_graphs:",
    ),
    "a graph keeps an old address": (
        "engine.py",
        "        self._open_passes()\n        self._bind(bundle)\n        self._capture_all()\n",
        "        self._open_passes()\n        self._bind(bundle)\n        self._capture_all()\n"
        "        self._open_passes()\n",
    ),
    "logits are read before the stream is done": (
        "engine.py",
        "        self._cuda.synchronize(self._stream)\n        self._in_flight.read()\n",
        "",
    ),
    "the next row is written before the last one left": (
        "engine.py",
        "                self._wait()\n                if self._plan.prefill is None:",
        "                if self._plan.prefill is None:",
    ),
    "the rows' copy is lost": (
        "engine.py",
        "        self._row_inputs.upload(self._stream)\n",
        "",
    ),
    "new rows never reach the cache": (
        "engine.py",
        "        self._append(self._plan.num_lanes, 1, watch)\n",
        "        self._in_flight = None\n",
    ),
    "logits of another row of the prompt": (
        "engine.py",
        "self._last_row = count - 1",
        "self._last_row = count - 2",
    ),
    "positions begin at the wrong row": (
        "passes.py",
        "np.arange(first, first + count)",
        "np.arange(first, first + count) + 1",
    ),
    "a written row is heard as the one before": (
        "passes.py",
        "[...] = False if audio_mask is None else audio_mask",
        "[...] |= False if audio_mask is None else audio_mask",
    ),
    "text of the wrong lane": (
        "passes.py",
        "self._text.fetch(self._cuda, num_lanes - 1, stream)",
        "self._text.fetch(self._cuda, 0, stream)",
    ),
    "an expert table of another layer": (
        "weights.py",
        "pointer = arena + first + base * record_bytes",
        "pointer = arena + first",
    ),
    "a weight that is bound a page off": (
        "weights.py",
        'engine.bind("table", tables[name], ',
        'engine.bind("table", tables[name] + 256, ',
    ),
    "a long chunk of sound without its state": (
        "codec.py",
        "sound, state = self._run(",
        "sound, _ = self._run(",
    ),
    "the second part of a file is lost": (
        "device.py",
        "cuda.copy_to_device(pointer + offset, address, count, stream)",
        "cuda.copy_to_device(pointer, address, count, stream)",
    ),
    "a copy on the device of too few rows": (
        "../../cuda.py",
        "ctypes.c_size_t(num_rows),",
        "ctypes.c_size_t(num_rows - 1),",
    ),
}


@pytest.fixture(scope="module")
def bundles(drill_small: Bundle, drill_exact: Bundle) -> tuple[Bundle, Bundle]:
    """Prompts at once through the plugin, and prompts row by row."""
    return drill_small, drill_exact


@pytest.fixture(scope="module")
def expected(
    bundles: tuple[Bundle, Bundle], tmp_path_factory: pytest.TempPathFactory
) -> list[list[Array]]:
    folder = tmp_path_factory.mktemp("right")
    return [said_by(bundle, folder, "late") for bundle in bundles]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_caught(
    name: str, bundles: tuple[Bundle, Bundle], expected: list[list[Array]], tmp_path: Path
) -> None:
    with planted(*MUTANTS[name]):
        for bundle, right in reversed(list(zip(bundles, expected, strict=True))):
            for mode in ("late", "eager"):
                if is_noticed(bundle, tmp_path, mode, right):
                    return
    pytest.fail(f"not detected: {name}")


def is_noticed(bundle: Bundle, folder: Path, mode: Mode, expected: list[Array]) -> bool:
    """Whether the drill fails or gives other logits."""
    try:
        said = said_by(bundle, folder, mode)
    except Exception:  # the emulator's own error, a refusal, the golden check
        return True
    return not all(np.array_equal(a, b) for a, b in zip(said, expected, strict=True))


def said_by(bundle: Bundle, folder: Path, mode: Mode) -> list[Array]:
    with tensorrt_module(folder), gpu(mode=mode):
        opening: Any = importlib.import_module("deeptalk_edge.runtime.backends.open")
        device: Any = importlib.import_module("deeptalk_edge.runtime.backends.tensorrt.device")
        device.STAGING_BYTES = 1 << 16  # so that files go through it in parts
        settings = ConversationSettings.of(bundle).for_backend()
        backend = opening.open_backend(bundle, "auto", settings)
        try:
            return Drill(backend, state_size=bundle.manifest.codec.state_size).run()
        finally:
            backend.close()


@contextmanager
def planted(file: str, old: str, new: str) -> Iterator[None]:
    """Context in which one line of the backend's modules is replaced."""
    path = (ROOT / FOLDER / file).resolve()
    source = path.read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{file}: the patch does not apply once: {old!r}"
    name = "deeptalk_edge." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    saved = _forget_modules()
    finder = _Finder(name, path, source.replace(old, new))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _forget_modules()
        sys.modules.update(saved)


def _forget_modules() -> dict[str, ModuleType]:
    """Remove the backend's and CUDA's modules from `sys.modules`."""
    names = ("deeptalk_edge.runtime.backends.tensorrt", "deeptalk_edge.runtime.cuda")
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(names)}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from changed source."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self._name, self._path, self._source = name, path, source

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname == self._name:
            return importlib.util.spec_from_loader(fullname, self, origin=str(self._path))
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._source, str(self._path), "exec"), module.__dict__)
