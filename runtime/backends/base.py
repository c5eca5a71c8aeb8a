"""What a backend is: encoder, engine and codec of one bundle, and how closely they must agree with
what the exporter computed.

A new backend is a folder with `open_backend(bundle, settings)` and a line in the table of open.py.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
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
    """What of a conversation's settings a backend is opened with."""

    context_rows: int
    """Rows that the cache holds."""
    threads: int = 1
    encoder_window: EncoderWindow = "whole"
    paging: PagingSettings = field(default_factory=PagingSettings)
    num_items: int = 1
    """Answers side by side: 2 for batch-parallel."""
    cuda_graphs: bool = True
    """Whether a GPU's step is launched as one CUDA graph."""


class Experts(Protocol):
    """What a conversation tells the routed experts of its engine, and asks them."""

    recorder: RouteRecorder | None
    """Takes down every choice; may be set and taken away between passes."""

    def user_started_speaking(self) -> None:
        """The user has begun to speak: a turn begins."""

    def idle(self) -> None:
        """Nobody talks: free slots may be filled."""

    def end_turn(self) -> dict[str, Any]:
        """Returns the turn's counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfCheck:
    """What `check_golden` holds a backend to. A tolerance is the largest error over the largest
    value; a name is what a message calls the part."""

    encoder: str
    decoder: str
    codec: str
    encoder_tolerance: float
    decoder_tolerance: float
    codec_tolerance: float
    logits_prefix: str = ""
    """Of the names in `golden.npz`: the logits that this backend's weights give."""
    features: str = NEAR_FEATURES
    """The features there that the encoder is held to: of a window that ends with the sound, or
    `features`, of the whole window, for an encoder that knows no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """An open one. One owner; not thread-safe."""

    name: BackendName
    kernel_path: str | None
    """The instruction set of our own kernels; None where others compute."""
    encoder: Encoder
    engine: Engine
    codec: Codec
    experts: Experts
    """The engine's; closed with it."""
    self_check: SelfCheck | None
    """None: it computes nothing that could be wrong."""

    gpu_stages: GpuStages | None = None
    """Times of a device that measures its stages."""

    def close(self) -> None:
        """Give everything back; doing it twice is doing it once."""
        with ExitStack() as parts:
            for part in (self.encoder, self.codec, self.engine):
                parts.callback(part.close)
