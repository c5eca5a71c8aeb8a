"""Pocketsphinx, an independent recogniser of English: what was spoken, among what can be.

sentences  one of some sentences: which answer was it
words      any string of their words: stricter, and its errors can be counted

Words that the dictionary lacks are heard if the caller can say how they are pronounced.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from importlib import import_module
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from deeptalk_edge.errors import SettingsError

Array = NDArray[np.float32]
Pronounce = Callable[[str], str]
"""The phones of a word as pocketsphinx's dictionary writes them: "HH AH L OW"."""

RATE_HZ = 16000
_SILENCE_MS = 200

# Pocketsphinx's own silence and word probabilities (0.005 and 0.65) are for speech that flows. In
# composed speech it took each pause for a short word: 34 % word errors on the true codes of 11
# answers. With these it is 1 % on 42, in less time.
_PAUSES = {"silprob": 0.9, "wip": 0.02}


class GrammarRecogniser:
    """Hears what a JSGF grammar allows. Not thread-safe."""

    def __init__(self, rate_hz: int, **options: float) -> None:
        """For samples at `rate_hz`; `options` are pocketsphinx's. Raises SettingsError if it is not
        installed."""
        try:
            sphinx = import_module("pocketsphinx")
        except ImportError as error:
            raise SettingsError(
                f"recognising answers needs pocketsphinx ({error}): pip install pocketsphinx"
            ) from error
        self._rate_hz = rate_hz
        self._decoder: Any = sphinx.Decoder(samprate=RATE_HZ, lm=None, loglevel="FATAL", **options)

    def phones_of(self, word: str, pronounce: Pronounce | None) -> str | None:
        """How a word sounds; None if neither the dictionary nor `pronounce` has it."""
        is_known = self._decoder.lookup_word(word) is not None
        # A word without phones would end the process.
        if not is_known and pronounce is not None and (phones := pronounce(word)):
            self._decoder.add_word(word, phones, True)
        known: str | None = self._decoder.lookup_word(word)
        return known

    def listen_for(self, grammar: str) -> None:
        """From now on hear what `grammar` allows."""
        self._decoder.add_jsgf_string("answers", grammar)
        self._decoder.activate_search("answers")

    def __call__(self, samples: Array) -> str:
        """The words in samples (N,) in -1..1; "" where nothing fits."""
        heard = np.clip(padded(samples, self._rate_hz), -1, 1)
        self._decoder.start_utt()
        self._decoder.process_raw((heard * 32767).astype(np.int16).tobytes(), full_utt=True)
        self._decoder.end_utt()
        hypothesis = self._decoder.hyp()
        return str(hypothesis.hypstr) if hypothesis else ""


class SentenceRecogniser(GrammarRecogniser):
    """Hears one of some sentences."""

    def __init__(
        self, sentences: Iterable[str], rate_hz: int, pronounce: Pronounce | None = None
    ) -> None:
        """`sentences` in lower case, without punctuation; one with a word that neither the
        dictionary nor `pronounce` has is never heard.

        Raises SettingsError if pocketsphinx is not installed or no sentence can be heard.
        """
        super().__init__(rate_hz)
        known = [
            sentence
            for sentence in sorted(set(sentences))
            if sentence and all(self.phones_of(word, pronounce) for word in sentence.split())
        ]
        _need(known)
        self.listen_for(f"#JSGF V1.0; grammar answers; public <answer> = {' | '.join(known)};")


class WordRecogniser(GrammarRecogniser):
    """Hears any string of some sentences' words.

    Words that sound alike count as one: sound alone does not tell "two" from "to".
    """

    def __init__(
        self, sentences: Iterable[str], rate_hz: int, pronounce: Pronounce | None = None
    ) -> None:
        """`sentences` in lower case, without punctuation; a word that neither the dictionary nor
        `pronounce` has is never heard.

        Raises SettingsError if pocketsphinx is not installed or no word can be heard.
        """
        super().__init__(rate_hz, **_PAUSES)
        first: dict[str, str] = {}
        self._alike: dict[str, str] = {}
        for word in sorted({word for sentence in sentences for word in sentence.split()}):
            if phones := self.phones_of(word, pronounce):
                self._alike[word] = first.setdefault(phones, word)
        _need(first)
        # A recursion: pocketsphinx hears the same with `(...)+`, in three times the time.
        self.listen_for(
            "#JSGF V1.0; grammar answers; public <answer> = <word> [<answer>]; "
            f"<word> = {' | '.join(first.values())};"
        )

    def fold(self, text: str) -> str:
        """A text to compare with what is heard: of words that sound alike the first."""
        return " ".join(self._alike.get(word, word) for word in text.split())


def padded(samples: Array, rate_hz: int) -> Array:
    """Samples (N,) at `RATE_HZ`, with silence on both sides."""
    silence = np.zeros(rate_hz * _SILENCE_MS // 1000, np.float32)
    quiet = np.concatenate([silence, samples.astype(np.float32), silence])
    heard: Array = soxr.resample(quiet, rate_hz, RATE_HZ)
    return heard


def _need(known: Collection[str]) -> None:
    if not known:
        raise SettingsError(
            "pocketsphinx knows none of the words of the answers; its dictionary is English"
        )
