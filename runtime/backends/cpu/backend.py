"""The CPU backend: our own kernels run the decoder and the codec, ONNX Runtime the encoder."""

from __future__ import annotations

import logging
from contextlib import ExitStack

from deeptalk_edge.bundle.golden import CPU_PREFIX
from deeptalk_edge.bundle.manifest import NATIVE_CODEC, NATIVE_WEIGHTS
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import BackendError
from deeptalk_edge.runtime.backends.base import Backend, BackendSettings, SelfCheck
from deeptalk_edge.runtime.backends.cpu.codec import CpuCodec
from deeptalk_edge.runtime.backends.cpu.engine import CpuEngine
from deeptalk_edge.runtime.backends.cpu.library import CpuLibrary
from deeptalk_edge.runtime.backends.ort.backend import (
    TOLERANCE,
    OrtCodec,
    encoder_tolerance,
    open_encoder,
)
from deeptalk_edge.runtime.experts.open import paged_experts
from deeptalk_edge.runtime.experts.paged import PagedExperts
from deeptalk_edge.runtime.lm.codec_stream import Codec

log = logging.getLogger(__name__)

DECODER_TOLERANCE = 0.1
"""Tolerance against a reference that has the kernels' weights. The kernels round the activations of
every product to int8. Measured errors: 0.01 to 0.02 on the tiny checkpoint, 0.05 on random weights
of the official size; a wrong scale or order gives 0.5 or more.
"""


def open_backend(bundle: Bundle, settings: BackendSettings) -> Backend:
    """Raises BackendError if the bundle is for another backend or the library does not load,
    ArtifactError if the bundle lacks what it needs, DoesNotFit if the memory does not suffice.
    """
    made_for = bundle.manifest.target.backend
    if made_for != "cpu":
        raise BackendError(
            f"{bundle.path}: made for the backend {made_for}, this is cpu; export the checkpoint "
            "with --device cpu-int8, or choose the backend ort"
        )
    library = CpuLibrary()
    with ExitStack() as opened:
        encoder = open_encoder(bundle, settings)
        opened.callback(encoder.close)
        codec = open_codec(bundle, threads=settings.threads, library=library)
        opened.callback(codec.close)
        experts: list[PagedExperts] = []  # at most one; the engine opens it last

        def open_experts() -> PagedExperts:
            experts.append(paged_experts(bundle, settings.paging))
            return experts[0]

        engine = CpuEngine(
            bundle,
            context_rows=settings.context_rows,
            threads=settings.threads,
            cache_kind="int8" if bundle.manifest.precision["kv_cache"] == "int8" else "bfloat16",
            library=library,
            open_experts=open_experts,
        )
        opened.pop_all()
    log.info("decoder: native kernels, %s", engine.kernel_path)
    graphs = bundle.manifest.ort_graphs
    return Backend(
        name="cpu",
        kernel_path=engine.kernel_path,
        encoder=encoder,
        engine=engine,
        codec=codec,
        experts=experts[0],
        self_check=SelfCheck(
            encoder=graphs.encoder,
            decoder=NATIVE_WEIGHTS,
            codec=graphs.codec,
            encoder_tolerance=encoder_tolerance(bundle),
            decoder_tolerance=DECODER_TOLERANCE,
            codec_tolerance=TOLERANCE,
            logits_prefix=CPU_PREFIX,
        ),
    )


def open_codec(bundle: Bundle, *, threads: int, library: CpuLibrary) -> Codec:
    """Open the codec on the kernels, or on ONNX Runtime for an early bundle without its weights."""
    manifest = bundle.manifest
    if NATIVE_CODEC not in manifest.files:
        return OrtCodec(bundle.file(manifest.ort_graphs.codec), threads=threads)
    weights = bundle.file(NATIVE_CODEC)
    return CpuCodec(weights, manifest.codec, threads=threads, library=library)
