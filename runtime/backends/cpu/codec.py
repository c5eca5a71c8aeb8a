"""The codec on our own CPU kernels: native/cpu/codec.cpp computes `codec.onnx`.

Only the codec that returned a state can continue from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_int32, c_int64
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.manifest import CodecEntry
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.backends.cpu.huge_pages import huge_array, read_into
from deeptalk_edge.runtime.backends.cpu.library import (
    CpuContext,
    CpuLibrary,
    Span,
    Structure,
    dense,
    int32s,
    span,
)

Array = NDArray[np.float32]

_MOST = 8  # most scales or blocks: DT_CODEC_MOST


class CodecSizes(Structure):
    """`dt_codec_spec`."""

    _fields_ = (
        ("num_scales", c_int32),
        ("vq_strides", c_int32 * _MOST),
        *((name, c_int32) for name in ("codebook_size", "codebook_dim", "latent_dim", "width")),
        ("num_blocks", c_int32),
        ("rates", c_int32 * _MOST),
        *((name, c_int32) for name in ("is_depthwise", "has_noise")),
        ("weights", Span),
    )


class CodecCall(Structure):
    """`dt_codec_call`."""

    _fields_ = (
        ("codes", Span),
        ("num_frames", c_int32),
        ("position", c_int64),
        ("length", c_int64),
        ("noise", Span * _MOST),
        *((name, Span) for name in ("state", "next_state", "pcm")),
    )


class CpuCodec:
    """SNAC's streaming decoder. One owner; not thread-safe. See `Codec`."""

    def __init__(
        self,
        weights: Path,
        entry: CodecEntry,
        *,
        threads: int,
        path: str | None = None,
        library: CpuLibrary | None = None,
    ) -> None:
        """Read `native_codec.bin`.

        `path` names one of the library's kernel paths; the default is the processor's best one.

        Raises ArtifactError if the file does not match the entry, BackendError if the library does
        not load, DoesNotFit if there is not enough memory.
        """
        self._entry = entry
        self._weights = huge_array(weights.stat().st_size if weights.is_file() else 0)
        read_into(weights, 0, self._weights)
        try:
            sizes = _sizes(entry, span(self._weights))
        except ValueError as error:
            raise ArtifactError(f"{weights}: {error}; export the bundle again") from error
        context = CpuContext(library or CpuLibrary(), path=path, threads=threads)
        self._context, calls = context, context.calls
        try:
            self._codec = context.open(calls.dt_codec_open, calls.dt_codec_close, byref(sizes))
        except ValueError as error:
            context.close()
            raise ArtifactError(f"{weights}: {error}; export the bundle again") from error
        found = context.call(calls.dt_codec_state_size, self._codec)
        if found != entry.state_size:
            context.close()
            raise ArtifactError(
                f"{weights}: a state of {found} values, the manifest says {entry.state_size}; "
                "export the bundle again"
            )

    def close(self) -> None:
        """Give everything back; idempotent."""
        self._context.close()

    @property
    def kernel_path(self) -> str:
        """Instruction set in use, by the library's name."""
        return self._context.path

    def decode(
        self, codes: Ids, *, position: int, length: int, state: Array, noise: Sequence[Array]
    ) -> tuple[Array, Array]:
        """See `Codec`.

        Raises ValueError for shapes that the graph does not take, BackendError for codes outside
        the codebooks, UsageError if the codec is closed, busy, or belongs to another process.
        """
        spec, rates = self._entry.spec, self._entry.noise_rates
        num_frames = len(codes)
        codes = np.ascontiguousarray(codes, np.int64)
        state = np.ascontiguousarray(state, np.float32)
        tapes = [np.ascontiguousarray(tape, np.float32) for tape in noise]
        pcm = np.empty(num_frames * spec.frame_samples, np.float32)
        next_state = np.empty(self._entry.state_size, np.float32)
        call = CodecCall(
            codes=dense(codes, np.int64, (num_frames, spec.frame_codes), "codes"),
            num_frames=num_frames,
            position=position,
            length=length,
            noise=(Span * _MOST)(
                *(
                    dense(tape, np.float32, (num_frames * rate,), f"noise_{i}")
                    for i, (tape, rate) in enumerate(zip(tapes, rates, strict=True))
                )
            ),
            state=dense(state, np.float32, (self._entry.state_size,), "state"),
            next_state=span(next_state),
            pcm=span(pcm),
        )
        self._context.run("codec", self._context.calls.dt_codec_run, self._codec, byref(call))
        return pcm, next_state


def _sizes(entry: CodecEntry, weights: Span) -> CodecSizes:
    """Raises ValueError for a size that the library's fields do not hold."""
    spec = entry.spec
    return CodecSizes(
        num_scales=len(spec.vq_strides),
        vq_strides=int32s("vq_strides", spec.vq_strides, _MOST),
        codebook_size=spec.codebook_size,
        codebook_dim=spec.codebook_dim,
        latent_dim=spec.latent_dim,
        width=spec.decoder_dim,
        num_blocks=len(spec.decoder_rates),
        rates=int32s("decoder_rates", spec.decoder_rates, _MOST),
        is_depthwise=spec.depthwise,
        has_noise=bool(entry.noise_rates),
        weights=weights,
    )
