"""What a conversation gives out while it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

Stopped = Literal["end", "max_rows", "context"]


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """More of the answer's sound: PCM (N,) at the codec's rate."""

    pcm: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What a turn cost. Times are compute: the caller's own time between events is not counted."""

    num_prompt_rows: int
    num_rows: int
    encoder_ms: float | None
    """Log-mel and encoder; None for a typed question."""
    prefill_ms: float
    first_frame_ms: float | None
    """From the question to the first complete codec frame; None without speech."""
    first_sample_ms: float | None
    """From the question to the first final sample; None without speech."""
    step_ms_p50: float | None
    """Sampling and decoding of one row; None for an answer of one row."""
    step_ms_p95: float | None
    compute_s: float
    audio_s: float
    stopped: Stopped
    """Why the answer ended: the model ended it, or a limit did."""
    num_clamped: int
    """Special ids found inside codec frames and read as code 0."""

    @property
    def real_time_factor(self) -> float | None:
        """Compute over sound; below 1 it keeps up."""
        return self.compute_s / self.audio_s if self.audio_s else None


@dataclass(frozen=True, slots=True)
class TurnDone:
    """The answer is complete."""

    text: str
    metrics: Metrics


Event: TypeAlias = TextPiece | AudioChunk | TurnDone
