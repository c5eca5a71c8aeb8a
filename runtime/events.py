"""What a conversation gives out while it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.target import BackendName
from deeptalk_edge.deprecation import old_classes, old_fields
from deeptalk_edge.errors import EdgeError

Array = NDArray[np.float32]

Stopped = Literal["end", "max_rows", "context", "not_understood"]


@dataclass(frozen=True, slots=True)
class TextPiece:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class AudioChunk:
    """More of the answer's sound: PCM (N,) at the codec's rate."""

    pcm: Array


@dataclass(frozen=True, slots=True)
class Transcript:
    """The words of a spoken question, as the bundle's word head has them."""

    text: str | None
    """Lower case, without punctuation; None where the bundle has no word head."""
    confidence: float | None
    """0 to 1: geometric mean of the words' highest probabilities."""
    reason: str | None
    """Why there is no text."""


@dataclass(frozen=True, slots=True)
class NotUnderstood:
    """The question is refused: a spoken line or silence takes the answer's place, and the history
    keeps no turn."""

    understood_p: float


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
    """Wall time within this answer's steps, up to its last sample or to where it was cut: log-mel,
    encoder, prefill, rows and codec. Not in it: the caller's time between two steps, playback,
    attempts that were discarded, and what is done while nobody waits."""
    audio_s: float
    """Sound that was made, heard or not."""
    text_log_p: float | None
    """How sure the model was of its first words, as a mean log-probability; None if it said too
    little."""
    understood_p: float | None
    """How likely the question was understood; None for a typed one, and where the bundle cannot
    tell."""
    right_p: float | None
    """How likely the answer is right, by the bundle's calibration; None for a typed question, for
    an answer that said too little, and where the bundle cannot tell."""
    gpu_ms: Mapping[str, float] | None
    """What a GPU took, by CUDA events: encoder, prefill and codec in all, a step in the median;
    None without one."""
    stopped: Stopped
    """Why the answer ended: the model ended it, or a limit did, or it was never begun."""
    num_clamped: int
    """Special ids found inside codec frames and read as code 0."""

    @property
    def real_time_factor(self) -> float | None:
        """Compute over sound; below 1 it keeps up."""
        return self.compute_s / self.audio_s if self.audio_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What ran, and how: no figure means anything without it."""

    bundle_sha256: str
    """Of the manifest, which has the hash of every other file."""
    backend: BackendName
    """Of the decoder."""
    kernel_path: str | None
    """The instruction set of our own kernels; None on ONNX Runtime."""
    threads: int
    mode: str
    precision: Mapping[str, str]
    """Of each part of the model."""


@old_fields(was_on_trial="was_speculative")
@dataclass(frozen=True, slots=True, kw_only=True)
class VoiceMetrics:
    """What a turn by voice felt like. Times run from the last voiced sample as the microphone gave
    it; what the device takes to deliver a sample is not known to us and not counted."""

    speech_s: float
    """Length of the utterance, pauses included: from its first voiced sample to its last."""
    hangover_ms: float
    """Silence until the turn counted as over."""
    was_speculative: bool
    """The answer was begun inside the hangover."""
    num_discarded: int
    """Attempts at this answer that the user spoke over before they were heard."""
    queued_ms: float | None
    """To the first sample of the answer in the loudspeaker's queue; None if none came."""
    audible_ms: float | None
    """To the first sample behind the loudspeaker's buffer; None if none came."""
    heard_s: float
    underruns: int
    """Times that the sound ran dry before the answer was over."""
    stop_ms: float | None
    """From the first voice over the answer to silence; None if nobody interrupted."""


@dataclass(frozen=True, slots=True)
class TurnDone:
    """The answer is complete, or as complete as it was heard."""

    text: str
    """What the history keeps."""
    metrics: Metrics
    voice: VoiceMetrics | None = None
    """None for a question that was not asked by voice."""


@dataclass(frozen=True, slots=True)
class SpeechStarted:
    """The user began to speak."""


@dataclass(frozen=True, slots=True)
class SpeechEnded:
    """The user's turn is over; the answer is due."""

    seconds: float
    """Length of the utterance."""


@dataclass(frozen=True, slots=True)
class NothingSaid:
    """Push-to-talk: the button was released, and no voice was heard; nothing is asked."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The user spoke over the answer, and it stopped."""

    heard_s: float
    """How much of it was heard."""


@dataclass(frozen=True, slots=True)
class AnswerResumed:
    """It was a false alarm: the answer goes on where it stopped."""


@dataclass(frozen=True, slots=True)
class TurnFailed:
    """No answer came."""

    error: EdgeError


@dataclass(frozen=True, slots=True)
class Overloaded:
    """The machine is too slow: a question is given up, and nothing of it is in the history."""

    reason: Literal["sound lost", "answer late"]
    """The microphone's sound was not read in time, so the question has a hole; or the user asked
    something else before the answer's first sound, or it did not come at all."""
    seconds: float
    """Of sound that was lost, or of waiting."""


@dataclass(frozen=True, slots=True)
class SoundLost:
    """Microphone or loudspeaker are gone; we try to get them back."""

    error: EdgeError


@dataclass(frozen=True, slots=True)
class SoundRestored:
    """They are back."""


Piece: TypeAlias = TextPiece | AudioChunk | Transcript | NotUnderstood
"""What a step of an answer brings."""

Pieces: TypeAlias = tuple[Piece, ...]

LiveEvent: TypeAlias = (
    SpeechStarted
    | SpeechEnded
    | NothingSaid
    | Transcript
    | NotUnderstood
    | TextPiece
    | AudioChunk
    | Interrupted
    | AnswerResumed
    | TurnDone
    | TurnFailed
    | Overloaded
    | SoundLost
    | SoundRestored
)
"""What a conversation by voice gives out."""

if not TYPE_CHECKING:  # else every name would be known to a type checker
    __getattr__ = old_classes(__name__, BargedIn="Interrupted")
