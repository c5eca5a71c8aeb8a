"""The protocol of a backend: encoder, engine and codec of one bundle, and how closely they must
agree with what the exporter computed.

A new backend is a folder with `open_backend(bundle, settings)` and a line in the table of open.py.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from deeptalk_edge.bundle.golden import NEAR_FEATURES
from deeptalk_edge.bundle.target import BackendName
from deeptalk_edge.runtime.backends.stages import GpuStages
from deeptalk_edge.runtime.experts.open import PagingSettings
from deeptalk_edge.runtime.experts.routes import RouteRecorder
from deeptalk_edge.runtime.lm.codec_stream import Codec
from deeptalk_edge.runtime.lm.encoder import Encoder, EncoderWindow
from deeptalk_edge.runtime.lm.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """The settings of a conversation that a backend is opened with."""

    context_rows: int
    """Capacity of the cache in rows."""
    threads: int = 1
    encoder_window: EncoderWindow = "whole"
    paging: PagingSettings = field(default_factory=PagingSettings)
    num_items: int = 1
    """Items decoded at once: 2 for batch-parallel."""
    cuda_graphs: bool = True
    """Whether a GPU launches a step as one CUDA graph."""
    kernel_cache: Path | None = None
    """File that keeps the kernels of TensorRT-RTX between starts."""


class Experts(Protocol):
    """A conversation's interface to the routed experts of its engine."""

    recorder: RouteRecorder | None
    """Records every routing; may be set and removed between passes."""

    def user_started_speaking(self) -> None:
        """The user has begun to speak, so a turn begins."""

    def idle(self) -> None:
        """Neither side speaks: free slots may be filled."""

    def end_turn(self) -> dict[str, Any]:
        """Return the turn's counters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfCheck:
    """What `check_golden` compares. A tolerance limits the largest error divided by the largest
    value; a name is what a message calls the part."""

    encoder: str
    decoder: str
    codec: str
    encoder_tolerance: float
    decoder_tolerance: float
    codec_tolerance: float
    logits_prefix: str = ""
    """Name in `golden.npz` of the logits that this backend's weights give."""
    features: str = NEAR_FEATURES
    """Name in `golden.npz` of the encoder's features: those of a window that ends with the sound,
    or `features`, of the whole window, for an encoder that has no other window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """An open backend. One owner; not thread-safe."""

    name: BackendName
    kernel_path: str | None
    """Instruction set of our own kernels; None if other libraries compute."""
    encoder: Encoder
    engine: Engine
    codec: Codec
    experts: Experts
    """The engine's experts, closed with it."""
    self_check: SelfCheck | None
    """None if the backend computes nothing to compare."""

    gpu_stages: GpuStages | None = None
    """GPU times of the stages; None if the backend does not measure them."""

    def close(self) -> None:
        """Give everything back; idempotent."""
        with ExitStack() as parts:
            for part in (self.encoder, self.codec, self.engine):
                parts.callback(part.close)
