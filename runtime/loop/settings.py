"""Timeouts and thresholds of the voice loop, in ms of microphone time."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Literal

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.endpoint import FRAME_MS

Commit = Literal["heard", "full"]

_SAMPLES_PER_MS = RATE_HZ // 1000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyPolicy:
    """The user's control over one answer."""

    interruptible: bool = True
    """Whether speech over the answer ends it; if not, the microphone is ignored while it plays."""
    commit: Commit = "heard"
    """Part of an interrupted answer that the history keeps: the heard text or the whole text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """Timeouts, thresholds and stop words of the state machine."""

    start_ms: int = 60
    """Voice that opens an utterance."""
    resume_ms: int = 40
    """Voice in a pause after which the utterance continues; less is a click and not part of it."""
    pre_roll_ms: int = 300
    """Sound kept before the first voice, because detectors respond late."""
    speculate_ms: int = 100
    """Silence after which a speculative answer begins; also the sound kept after the last voice."""
    is_speculating: bool = True
    hangover_ms: int = 500
    """Silence that ends an utterance if the end-of-turn cue has not judged the pause."""
    max_utterance_ms: int = 30_000
    push_to_talk: bool = False
    """Push-to-talk: listen only between `press` and `release`; nothing else ends an utterance."""

    duck_ms: int = 80
    """Voice over an answer after which the answer gets quieter."""
    duck_gain: float = 0.25
    confirm_ms: int = 260
    """Voice over an answer after which it stops; shorter voice is a back-channel."""
    warm_up_ms: int = 500
    """First part of an answer's sound, in which the echo canceller adapts: voice does not stop the
    answer, and only `confirm_ms` of voice makes it quieter."""
    release_ms: int = 120
    """Silence after which voice over an answer counts as over."""
    turn_ms: int = 440
    """Voice over an answer that counts as a new utterance; after less, a stopped answer resumes."""
    stop_words: tuple[str, ...] = ()
    """Words or phrases that end an answer at once."""
    resume_answer_ms: int = 1500
    """Silence after a false alarm until the stopped answer resumes."""

    merge_ms: int = 1500
    """Silence without a first sound of the answer after which voice no longer belongs to the
    question: the question is given up and another one begins."""
    thinking_ms: int = 20_000
    """Longest wait for the first sound of an answer."""
    speaking_ms: int = 180_000
    """Longest answer."""
    overlap_ms: int = 2_000
    """Longest time that voice over an answer, or over a stopped one, may stay undecided."""
    recovering_ms: int = 600_000
    """Longest time of tries to reopen a lost device."""
    forget_ms: int | None = None
    """Silence between turns after which a new conversation begins, for the next customer."""

    def __post_init__(self) -> None:
        positive = [
            name for name in self.__slots__ if name.endswith("_ms") and name != "pre_roll_ms"
        ]
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < FRAME_MS:
                raise SettingsError(f"{name} = {value}: a frame is {FRAME_MS} ms already")
        if not 0 <= self.pre_roll_ms <= 2000:
            raise SettingsError(f"pre_roll_ms = {self.pre_roll_ms}: expected 0 to 2000")
        if not 0 < self.duck_gain <= 1:
            raise SettingsError(f"duck_gain = {self.duck_gain}: expected more than 0, at most 1")
        for shorter, longer in (
            ("speculate_ms", "hangover_ms"),
            ("duck_ms", "confirm_ms"),
            ("confirm_ms", "turn_ms"),
        ):
            if getattr(self, shorter) >= getattr(self, longer):
                raise SettingsError(
                    f"{shorter} = {getattr(self, shorter)}: expected less than "
                    f"{longer} = {getattr(self, longer)}"
                )

    def within(self, max_question_samples: int) -> LoopSettings:
        """Return the settings for a model whose longest question has so many samples, margins
        included."""
        margins_ms = self.pre_roll_ms + self.speculate_ms
        longest_ms = max_question_samples // _SAMPLES_PER_MS - margins_ms
        return replace(self, max_utterance_ms=min(self.max_utterance_ms, longest_ms))

    def warn_if_cut(self, spoken_samples: int) -> None:
        """Log a warning if an utterance ended because it reached the longest question."""
        if spoken_samples >= self.max_utterance_ms * _SAMPLES_PER_MS:
            log.warning(
                "speech without a pause for %.1f s, the longest question: it ends there, and the "
                "rest is another question",
                self.max_utterance_ms / 1000,
            )
