"""The ONNX Runtime backend: it runs every graph of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.backends.base import Backend, BackendSettings, SelfCheck
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.backends.ort.graph import OrtGraph
from deeptalk_edge.runtime.experts.open import paged_experts
from deeptalk_edge.runtime.lm.encoder import Encoder

Array = NDArray[np.float32]

TOLERANCE = 1e-3
"""Tolerance in float32. Kernels of other CPUs differ by about 1e-5; a wrong weight, a wrong order
of ids or a lost cache row by 0.1 or more.
"""

INT8_TOLERANCE = 0.05
"""Tolerance of an int8 encoder: an activation that is rounded the other way changes by 1/255.
"""


def open_backend(bundle: Bundle, settings: BackendSettings) -> Backend:
    """Raises ArtifactError if the bundle lacks what it needs, BackendError if a graph does not
    load, DoesNotFit if there is not enough memory.
    """
    graphs = bundle.manifest.ort_graphs
    with ExitStack() as opened:
        encoder = open_encoder(bundle, settings)
        opened.callback(encoder.close)
        codec = OrtCodec(bundle.file(graphs.codec), threads=settings.threads)
        opened.callback(codec.close)
        engine = OrtEngine(
            bundle,
            context_rows=settings.context_rows,
            threads=settings.threads,
            open_experts=lambda: paged_experts(bundle, settings.paging),
        )
        opened.pop_all()
    return Backend(
        name="ort",
        kernel_path=None,
        encoder=encoder,
        engine=engine,
        codec=codec,
        experts=engine.experts,
        self_check=SelfCheck(
            encoder=graphs.encoder,
            decoder=f"{graphs.embed}, {graphs.segments[0]} to {graphs.segments[-1]}, {graphs.head}",
            codec=graphs.codec,
            encoder_tolerance=encoder_tolerance(bundle),
            decoder_tolerance=TOLERANCE,
            codec_tolerance=TOLERANCE,
        ),
    )


def open_encoder(bundle: Bundle, settings: BackendSettings) -> Encoder:
    """Raises ArtifactError or BackendError if the graph does not load."""
    manifest = bundle.manifest
    graph = OrtEncoder(bundle.file(manifest.ort_graphs.encoder), threads=settings.threads)
    return Encoder(graph, manifest.model.encoder, window=settings.encoder_window)


def encoder_tolerance(bundle: Bundle) -> float:
    """Tolerance of the encoder at the bundle's precision."""
    return INT8_TOLERANCE if bundle.manifest.precision["encoder"] == "int8" else TOLERANCE


class OrtEncoder:
    """See `EncoderGraph`."""

    def __init__(self, path: Path, *, threads: int) -> None:
        """Raises BackendError if the graph does not load."""
        self._graph = OrtGraph(path, threads=threads)
        self.close = self._graph.close

    def encode(self, log_mel: Array, num_frames: int) -> Array:
        kept = np.array(num_frames, np.int64)
        features: Array = self._graph.run({"log_mel": log_mel, "num_frames": kept})[0]
        return features


class OrtCodec:
    """See `Codec`."""

    def __init__(self, path: Path, *, threads: int) -> None:
        """Raises BackendError if the graph does not load."""
        self._graph = OrtGraph(path, threads=threads)
        self.close = self._graph.close

    def decode(
        self, codes: Ids, *, position: int, length: int, state: Array, noise: Sequence[Array]
    ) -> tuple[Array, Array]:
        pcm, next_state = self._graph.run(
            {
                "codes": codes,
                "position": np.array(position, np.int64),
                "length": np.array(length, np.int64),
                "state": state,
                **{f"noise_{block}": tape for block, tape in enumerate(noise)},
            }
        )
        return pcm, next_state
