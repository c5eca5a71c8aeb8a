"""End of turn: how long must the silence last before the answer is due?

sound     asked once per pause, at about 100 ms of silence, with the utterance so far: a cue says
          how likely it is complete; the more likely, the shorter the wait
meaning   asked once more, when the speculative answer has its first words: the bundle's score says
          whether the question is whole, or else how sure the model is of those words. It can only
          shorten the wait

Where the bundle has that score, sound decides nothing: the melody calls 12 % of falling parts whole
(docs/measurements/end_of_turn.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.deprecation import old_fields
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.audio.endpoint import FRAME_MS
from deeptalk_edge.runtime.audio.prosody import FinalLowering
from deeptalk_edge.runtime.audio.smart_turn import SmartTurn

Array = NDArray[np.float32]

HangoverKind = Literal["fixed", "adaptive"]


class EndOfTurn(Protocol):
    """Judges a pause."""

    def hangover_ms(self, utterance: Array) -> int:
        """The silence, counted from the last voiced sample, that ends this turn.

        `utterance` is 16 kHz PCM (N,) from its first voice to now, the pause included.
        """

    def enough_ms(self, text_log_p: float, is_whole: bool | None) -> int | None:
        """The silence that is enough, by the meaning of what was said; None if that says nothing.

        `text_log_p` is the mean log-probability of the answer's first words; `is_whole` says
        whether the bundle takes the question for a whole one, None if it cannot tell.
        """


class TurnCue(Protocol):
    """Listens for the end of a sentence."""

    def p_complete(self, utterance: Array) -> float:
        """How likely the speaker has finished, 0 to 1; `utterance` as in `EndOfTurn`."""


@dataclass(frozen=True, slots=True)
class FixedHangover:
    """The same silence for every pause."""

    ms: int = 500

    def __post_init__(self) -> None:
        if self.ms < FRAME_MS:
            raise SettingsError(f"hangover {self.ms} ms: a frame is {FRAME_MS} ms already")

    def hangover_ms(self, utterance: Array) -> int:
        return self.ms

    def enough_ms(self, text_log_p: float, is_whole: bool | None) -> None:
        return None


@old_fields(sure_log_p="confident_log_p")
@dataclass(frozen=True, slots=True, kw_only=True)
class HangoverSettings:
    """What a cue's verdict is worth."""

    complete_p: float = 0.6
    """A cue this sure of the end..."""
    incomplete_p: float = 0.1
    """... and this sure of more to come."""
    confident_log_p: float | None = -0.0005
    """Mean log-probability of an answer's first words that says that the question was whole; None:
    nothing does. Used only where the bundle cannot tell (`understanding.json`, `complete`)."""
    complete_ms: int = 200
    unsure_ms: int = 500
    incomplete_ms: int = 1200
    not_whole_ms: int = 1500
    """By meaning alone: the wait until the bundle calls the question whole, if it ever does. 7 % of
    the pauses inside spoken sentences are longer, by the distribution that `bench end_of_turn`
    draws from."""

    def __post_init__(self) -> None:
        if not 0 <= self.incomplete_p <= self.complete_p <= 1:
            raise SettingsError(
                f"incomplete_p = {self.incomplete_p}, complete_p = {self.complete_p}: expected "
                "0 <= incomplete_p <= complete_p <= 1"
            )
        if self.confident_log_p is not None and not self.confident_log_p <= 0:
            raise SettingsError(
                f"confident_log_p = {self.confident_log_p}: expected 0 or less, or None"
            )
        if self.not_whole_ms < self.complete_ms:
            raise SettingsError(
                f"not_whole_ms = {self.not_whole_ms}: expected {self.complete_ms} (complete_ms) or "
                "more"
            )
        if not FRAME_MS <= self.complete_ms <= self.unsure_ms <= self.incomplete_ms:
            raise SettingsError(
                f"hangovers of {self.complete_ms}, {self.unsure_ms} and {self.incomplete_ms} ms: "
                f"expected rising values from {FRAME_MS} ms"
            )


class AdaptiveHangover:
    """Short after a finished sentence, long after half of one."""

    def __init__(self, cue: TurnCue, settings: HangoverSettings | None = None) -> None:
        self._cue, self._settings = cue, settings or HangoverSettings()

    def hangover_ms(self, utterance: Array) -> int:
        settings, p = self._settings, self._cue.p_complete(utterance)
        if p >= settings.complete_p:
            return settings.complete_ms
        return settings.incomplete_ms if p < settings.incomplete_p else settings.unsure_ms

    def enough_ms(self, text_log_p: float, is_whole: bool | None) -> int | None:
        if is_whole is None:
            least = self._settings.confident_log_p
            is_whole = least is not None and text_log_p >= least
        return self._settings.complete_ms if is_whole else None


class MeaningHangover:
    """Short after a question that the bundle calls whole, long after anything else."""

    def __init__(self, settings: HangoverSettings | None = None) -> None:
        self._settings = settings or HangoverSettings()

    def hangover_ms(self, utterance: Array) -> int:
        return self._settings.not_whole_ms

    def enough_ms(self, text_log_p: float, is_whole: bool | None) -> int | None:
        return self._settings.complete_ms if is_whole else None


def open_end_of_turn(
    kind: HangoverKind = "adaptive",
    *,
    fixed_ms: int = 500,
    model: Path | None = None,
    knows_whole: bool = False,
) -> EndOfTurn:
    """The judge of this kind. `model` is a Smart Turn file; without it meaning is the cue where
    the bundle knows whole questions (`knows_whole`), and the melody elsewhere.

    Raises ArtifactError if the file cannot be used.
    """
    if kind == "fixed":
        return FixedHangover(fixed_ms)
    if model is None and knows_whole:
        return MeaningHangover()
    return AdaptiveHangover(SmartTurn(model) if model else FinalLowering())
