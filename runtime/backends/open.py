"""Chooses and opens the backend of a bundle. The table names every backend."""

from __future__ import annotations

import logging
from importlib import import_module

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.bundle.target import BackendName
from deeptalk_edge.errors import BackendError, SettingsError
from deeptalk_edge.runtime.backends.base import Backend, BackendSettings
from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary
from deeptalk_edge.runtime.backends.self_check import check_golden
from deeptalk_edge.runtime.settings import BackendChoice

log = logging.getLogger(__name__)

BACKENDS: dict[BackendName, str] = {
    "cpu": "deeptalk_edge.runtime.backends.cpu.backend",
    "ort": "deeptalk_edge.runtime.backends.ort.backend",
    "tensorrt": "deeptalk_edge.runtime.backends.tensorrt.backend",
    "fake": "deeptalk_edge.runtime.backends.fake",
}
"""Module of each backend, with its `open_backend`; imported when the backend is chosen."""


def open_backend(bundle: Bundle, choice: BackendChoice, settings: BackendSettings) -> Backend:
    """Open the backend and check that it computes what the exporter computed.

    Raises ArtifactError if the bundle lacks what it needs, BackendError if the backend cannot run
    the bundle or computes something else, DoesNotFit if there is not enough memory, SettingsError
    for a setting that this bundle has no use for.
    """
    made_for = bundle.manifest.target.backend
    if settings.kernel_cache is not None and made_for != "tensorrt_rtx":
        raise SettingsError(
            f"{bundle.path}: made for the backend {made_for}, and only TensorRT-RTX compiles "
            "kernels at a start; leave out --kernel-cache"
        )
    module = import_module(BACKENDS[backend_for(bundle, choice)])
    backend: Backend = module.open_backend(bundle, settings)
    try:
        check_golden(bundle, backend)
    except BaseException:
        backend.close()
        raise
    return backend


def backend_for(bundle: Bundle, choice: BackendChoice) -> BackendName:
    """Return the backend that a choice selects for this bundle on this machine."""
    if choice != "auto":
        return choice
    made_for = bundle.manifest.target.backend
    if made_for in ("tensorrt", "tensorrt_rtx"):
        return "tensorrt"
    if made_for == "ort":
        return "ort"
    try:
        CpuLibrary()
    except BackendError as error:
        log.warning("ONNX Runtime runs all of it, several times slower: %s", error)
        return "ort"
    return "cpu"
