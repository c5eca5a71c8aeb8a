"""How patient the voice loop is: every wait of every state, in milliseconds of microphone time."""

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
    """What the user may do to one answer."""

    interruptible: bool = True
    """Whether speech over it ends it; if not, the user is not listened to while it sounds."""
    commit: Commit = "heard"
    """What the history keeps of an interrupted answer: what was heard, or all that was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """When speech opens an utterance, and when silence closes it."""

    start_ms: int = 60
    """Voice before an utterance opens."""
    resume_ms: int = 40
    """Voice inside a pause before the utterance goes on; less is a click and no part of it."""
    pre_roll_ms: int = 300
    """Sound kept before the first voice: detectors wake late."""
    speculate_ms: int = 100
    """Silence before a speculative answer begins; also the sound kept after the last voice."""
    is_speculating: bool = True
    hangover_ms: int = 500
    """Silence that ends an utterance, until the end-of-turn cue has judged the pause."""
    max_utterance_ms: int = 30_000
    push_to_talk: bool = False
    """Listen between `press` and `release` only; nothing else ends an utterance."""

    duck_ms: int = 80
    """Voice over an answer before the answer gets quieter."""
    duck_gain: float = 0.25
    confirm_ms: int = 260
    """Voice over an answer before it stops; shorter is a back-channel."""
    warm_up_ms: int = 500
    """Of an answer's sound, while the echo canceller finds its echo: voice alone does not stop
    it, and it gets quieter behind `confirm_ms` of voice only."""
    release_ms: int = 120
    """Silence after which voice over an answer counts as over."""
    turn_ms: int = 440
    """Voice over an answer that makes an utterance of its own; a stopped answer goes on behind
    less."""
    stop_words: tuple[str, ...] = ()
    """Words or phrases that end an answer at once, however short they are."""
    resume_answer_ms: int = 1500
    """Silence after a false alarm before the stopped answer goes on."""

    merge_ms: int = 1500
    """Silence before the first sound of an answer after which voice is no longer part of the
    question: the question is given up, and another one begins."""
    thinking_ms: int = 20_000
    """Wait for the first sound of an answer."""
    speaking_ms: int = 180_000
    """Length of an answer."""
    overlap_ms: int = 2_000
    """Undecided voice over an answer, or over a stopped one."""
    recovering_ms: int = 600_000
    """Tries to get a lost device back."""
    forget_ms: int | None = None
    """Silence between turns after which the conversation begins anew: the next customer."""

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
        """The same for a model that hears so many samples at a time, margins included."""
        margins_ms = self.pre_roll_ms + self.speculate_ms
        longest_ms = max_question_samples // _SAMPLES_PER_MS - margins_ms
        return replace(self, max_utterance_ms=min(self.max_utterance_ms, longest_ms))

    def warn_if_cut(self, spoken_samples: int) -> None:
        """Say so if an utterance ended because it cannot be longer."""
        if spoken_samples >= self.max_utterance_ms * _SAMPLES_PER_MS:
            log.warning(
                "speech without a pause for %.1f s, the longest question: it ends there, and the "
                "rest is a question of its own",
                self.max_utterance_ms / 1000,
            )
