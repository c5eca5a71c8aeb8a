"""The events of a conversation."""

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
    """The words of a spoken question, from the bundle's word head."""

    text: str | None
    """Lower case, without punctuation; None if there is no transcript."""
    confidence: float | None
    """0 to 1: geometric mean of the words' highest probabilities."""
    reason: str | None
    """Reason why `text` is None."""


@dataclass(frozen=True, slots=True)
class NotUnderstood:
    """The question is refused: a spoken line or silence replaces the answer, and the history keeps
    no turn."""

    understood_p: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The cost of a turn. Times are compute: the caller's time between events is not counted."""

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
    """Wall time of this answer's steps, up to its last sample or its interruption: log-mel,
    encoder, prefill, rows and codec. It does not include the caller's time between steps, playback,
    discarded attempts, or work while no answer is awaited."""
    audio_s: float
    """Length of the sound that was made, heard or not."""
    text_log_p: float | None
    """Confidence in the answer's first words, as a mean log-probability; None if the answer is too
    short."""
    understood_p: float | None
    """Probability that the question was understood; None for a typed question and for a bundle that
    cannot estimate it."""
    right_p: float | None
    """Probability that the answer is right, by the bundle's calibration; None for a typed question,
    for an answer that is too short, and for a bundle that cannot estimate it."""
    gpu_ms: Mapping[str, float] | None
    """GPU times by CUDA events: sums of encoder, prefill and codec, the median of a step; None
    without a GPU."""
    stopped: Stopped
    """Why the answer ended: by the model, by a limit, or before it began."""
    num_clamped: int
    """Special ids inside codec frames, which were read as code 0."""

    @property
    def real_time_factor(self) -> float | None:
        """Compute time divided by the sound's length; below 1, playback never waits."""
        return self.compute_s / self.audio_s if self.audio_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The setup of a measurement: bundle, backend and precision."""

    bundle_sha256: str
    """Hash of the manifest, which holds the hash of every other file."""
    backend: BackendName
    """Threads of the decoder."""
    kernel_path: str | None
    """Instruction set of our own kernels; None on other backends."""
    threads: int
    mode: str
    precision: Mapping[str, str]
    """Precision of each part of the model."""


@old_fields(was_on_trial="was_speculative")
@dataclass(frozen=True, slots=True, kw_only=True)
class VoiceMetrics:
    """The delays of a turn by voice, as the user perceives them. Times run from the last voiced
    sample that the microphone gave; the device's own input delay is unknown and not included."""

    speech_s: float
    """Length of the utterance, pauses included: from its first voiced sample to its last."""
    hangover_ms: float
    """Silence until the turn ended."""
    was_speculative: bool
    """Whether the answer was begun during the hangover."""
    num_discarded: int
    """Attempts at this answer that were discarded because the user spoke on."""
    queued_ms: float | None
    """Time to the answer's first sample in the loudspeaker's queue; None if none came."""
    audible_ms: float | None
    """Time to the first audible sample, after the loudspeaker's buffer; None if none came."""
    heard_s: float
    underruns: int
    """Times that the loudspeaker's queue ran dry during the answer."""
    stop_ms: float | None
    """Time from the first voice over the answer to silence; None without an interruption."""


@dataclass(frozen=True, slots=True)
class TurnDone:
    """The answer is complete, or was interrupted."""

    text: str
    """Text that the history keeps."""
    metrics: Metrics
    voice: VoiceMetrics | None = None
    """None for a question that was not asked through `listen`."""


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
    """Push-to-talk: the button was released, no voice was heard, and nothing is asked."""


@dataclass(frozen=True, slots=True)
class Interrupted:
    """The user spoke over the answer, and it stopped."""

    heard_s: float
    """Length of the answer that was heard."""


@dataclass(frozen=True, slots=True)
class AnswerResumed:
    """The interruption was a false alarm: the answer continues where it stopped."""


@dataclass(frozen=True, slots=True)
class TurnFailed:
    """The turn ended without an answer."""

    error: EdgeError


@dataclass(frozen=True, slots=True)
class Overloaded:
    """The machine is too slow: a question is given up, and the history does not contain it."""

    reason: Literal["sound lost", "answer late"]
    """`sound lost`: the microphone's sound was not read in time, so the question has a gap. `answer
    late`: the user asked something else before the answer's first sound, or no sound came in
    time."""
    seconds: float
    """Length of the lost sound, or of the wait."""


@dataclass(frozen=True, slots=True)
class SoundLost:
    """Microphone or loudspeaker are lost; the loop tries to reopen them."""

    error: EdgeError


@dataclass(frozen=True, slots=True)
class SoundRestored:
    """Microphone and loudspeaker are open again."""


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
"""The events of a conversation by voice."""

if not TYPE_CHECKING:  # otherwise a type checker would accept every name
    __getattr__ = old_classes(__name__, BargedIn="Interrupted")
