"""Which backend runs decoder and codec, and their opening: our own kernels, or ONNX Runtime.

A bundle for `native` serves both: its graphs are float32, its routed experts the same records.
Either way experts come out of a pager, so a pool smaller than the model changes no answer.
"""

from __future__ import annotations

import logging

from deeptalk_edge.bundle.manifest import NATIVE_CODEC
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import BackendError
from deeptalk_edge.runtime.backends.cpu.codec import NativeCodec
from deeptalk_edge.runtime.backends.cpu.engine import NativeEngine
from deeptalk_edge.runtime.backends.cpu.library import NativeLibrary
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine, OrtGraph
from deeptalk_edge.runtime.experts.open import paged_experts
from deeptalk_edge.runtime.experts.paged import PagedExperts
from deeptalk_edge.runtime.lm.engine import Engine
from deeptalk_edge.runtime.settings import ConversationSettings, EngineChoice

log = logging.getLogger(__name__)


def open_engine(
    bundle: Bundle, settings: ConversationSettings, library: NativeLibrary | None
) -> tuple[Engine, PagedExperts]:
    """The engine on the kernels or, without them, on ONNX Runtime, and its experts, which it
    closes.

    Raises ArtifactError if the bundle lacks what it needs, BackendError if a graph does not load,
    DoesNotFit if the memory does not suffice.
    """

    def open_experts() -> PagedExperts:
        return paged_experts(bundle, settings.paging)

    if library is None:
        ort = OrtEngine(
            bundle,
            context_rows=settings.context_rows,
            threads=settings.threads,
            open_experts=open_experts,
        )
        return ort, ort.experts
    native = NativeEngine(
        bundle,
        context_rows=settings.context_rows,
        threads=settings.threads,
        cache_kind="int8" if bundle.manifest.precision["kv_cache"] == "int8" else "bfloat16",
        library=library,
        open_experts=open_experts,
    )
    log.info("decoder: native kernels, %s", native.kernel_path)
    assert isinstance(native.experts, PagedExperts)
    return native, native.experts


def open_codec(
    bundle: Bundle, *, threads: int, library: NativeLibrary | None
) -> OrtGraph | NativeCodec:
    """The codec on the kernels, or on ONNX Runtime without them or their weights.

    Raises ArtifactError, BackendError and DoesNotFit as `open_engine` does.
    """
    manifest = bundle.manifest
    if library is None or NATIVE_CODEC not in manifest.files:
        return OrtGraph(bundle.file(manifest.ort_graphs.codec), threads=threads)
    weights = bundle.file(NATIVE_CODEC)
    return NativeCodec(weights, manifest.codec, threads=threads, library=library)


def kernels_for(bundle: Bundle, choice: EngineChoice) -> NativeLibrary | None:
    """The kernels, or None for ONNX Runtime.

    Raises BackendError if they are asked for and not there.
    """
    backend = bundle.manifest.target.backend
    if choice == "native" and backend != "native":
        raise BackendError(
            f"{bundle.path}: made for the backend {backend}, this is native; export the checkpoint "
            "with --device cpu-int8, or choose the backend ort"
        )
    if choice == "ort" or backend != "native":
        return None
    try:
        return NativeLibrary()
    except BackendError as error:
        if choice == "native":
            raise
        log.warning("ONNX Runtime runs all of it, several times slower: %s", error)
        return None
