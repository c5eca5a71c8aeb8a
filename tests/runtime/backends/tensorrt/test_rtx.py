"""TensorRT-RTX, emulated: the same engine code, contexts made by a config, and kernels kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.runtime.backends.base import Backend
from deeptalk_edge.runtime.backends.open import open_backend
from deeptalk_edge.runtime.settings import ConversationSettings
from tests.runtime.backends.tensorrt import emulated_tensorrt
from tests.runtime.backends.tensorrt.emulated_cuda import EmulatedCuda
from tests.runtime.backends.tensorrt.emulation import gpu, tensorrt_module
from tests.runtime.backends.tensorrt.test_engine import drilled, error

VERSION = "1.7.1.116"


@pytest.fixture(scope="module")
def rtx(drill_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The drill's checkpoint for an RTX 4060, float32, in operators."""
    place = tmp_path_factory.mktemp("rtx")
    card = load_profile("rtx-4060")
    parts = ("encoder", "decoder", "experts", "head", "codec", "kv_cache")
    changes: Any = dict.fromkeys(parts, "float32")
    form = replace(card, precision=replace(card.precision, **changes, expert_group=None))
    with tensorrt_module(place, VERSION, name="tensorrt_rtx"):
        export_bundle(drill_checkpoint, place / "bundle", ExportSettings(profile=form))
    return Bundle.open(place / "bundle")


@contextmanager
def card(folder: Path) -> Iterator[EmulatedCuda]:
    """An emulated RTX 4060 with the emulated TensorRT-RTX."""
    with (
        tensorrt_module(folder, VERSION, name="tensorrt_rtx"),
        gpu(capability=(8, 9)) as cuda,
    ):
        yield cuda


def opened(bundle: Bundle, cache: Path) -> Backend:
    settings = replace(ConversationSettings.of(bundle), kernel_cache=cache)
    return open_backend(bundle, "auto", settings.for_backend())


def num_compiled(bundle: Bundle, cache: Path) -> int:
    """How many kernels a start compiles."""
    emulated_tensorrt.compiled.clear()
    opened(bundle, cache).close()
    return len(emulated_tensorrt.compiled)


def test_its_engines_equal_onnx_runtimes(rtx: Bundle, drill_on_cpu: Bundle, tmp_path: Path) -> None:
    with card(tmp_path) as cuda:
        assert error(drilled(rtx), drilled(drill_on_cpu)) < 1e-5
    assert cuda.is_clean
    assert cuda.calls["cudaGraphLaunch"] > 40


def test_the_second_start_compiles_no_kernel(rtx: Bundle, tmp_path: Path) -> None:
    cache = tmp_path / "kernels"
    with card(tmp_path):
        assert num_compiled(rtx, cache) == len(rtx.manifest.engines)
        assert num_compiled(rtx, cache) == 0


def test_kernels_are_on_disk_before_the_backend_is_closed(rtx: Bundle, tmp_path: Path) -> None:
    """A kiosk may lose its power."""
    cache = tmp_path / "kernels"
    with card(tmp_path):
        backend = opened(rtx, cache)
        kept = cache.read_bytes()
        backend.close()
    assert cache.read_bytes() == kept


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-1], "damaged; the kernels are compiled again"),
        (lambda c: c[: len(c) // 2], "damaged"),
        (lambda c: c.partition(b"\n")[0] + b"\n", "damaged"),
        (lambda c: c[:-1] + bytes([c[-1] ^ 1]), "damaged"),
    ],
)
def test_a_damaged_file_is_made_again(
    damage: object,
    message: str,
    rtx: Bundle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert callable(damage)
    cache = tmp_path / "kernels"
    with card(tmp_path):
        num_compiled(rtx, cache)
        good = cache.read_bytes()
        cache.write_bytes(damage(good))
        with caplog.at_level(logging.WARNING):
            assert num_compiled(rtx, cache) == len(rtx.manifest.engines)
    assert message in caplog.text
    assert cache.read_bytes() == good


def test_kernels_of_another_version_are_compiled_again(
    rtx: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "kernels"
    with card(tmp_path):
        num_compiled(rtx, cache)
        monkeypatch.setattr(
            emulated_tensorrt.IRuntimeCache, "deserialize", lambda self, blob: False
        )
        with caplog.at_level(logging.WARNING):
            assert num_compiled(rtx, cache) == len(rtx.manifest.engines)
    assert "by another TensorRT-RTX or for another GPU" in caplog.text


def test_another_file_is_never_replaced(rtx: Bundle, tmp_path: Path) -> None:
    letter = tmp_path / "letter.txt"
    letter.write_text("dear")
    with card(tmp_path) as cuda, pytest.raises(SettingsError, match="is no kernel cache of ours"):
        opened(rtx, letter)
    assert letter.read_text() == "dear"
    assert cuda.is_clean


def test_a_place_that_cannot_be_written_costs_a_warning(
    rtx: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with card(tmp_path), caplog.at_level(logging.WARNING):
        opened(rtx, tmp_path / "absent" / "kernels").close()
    assert "cannot be written" in caplog.text


def test_full_tensorrt_has_no_use_for_a_cache(
    drill_exact: Bundle, cuda: EmulatedCuda, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=r"only TensorRT-RTX compiles.*--kernel-cache"):
        opened(drill_exact, tmp_path / "kernels")
