"""Stop words: who says one over an answer ends it, however short the word is.

A spotter listens only while somebody speaks over an answer; a word that it misses is voice like any
other. The default is pocketsphinx's keyphrase search: English, a model inside the package, 3 % of
real time. It holds the interpreter for half a millisecond per 20 ms of sound, so it belongs in a
thread beside the audio thread, not into it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.sound.pcm import as_int16

Array = NDArray[np.float32]

# Of a likelihood ratio, for each phone: 1e-12 for "stop". Higher misses more, lower hears the word
# in others.
_THRESHOLD_PER_PHONE = 1e-3
# What the decoder takes for the mean of speech at first; its own is too far off for a single word.
# It is the mean over a question that espeak-ng speaks at -20 dBFS.
_SPEECH_CEPSTRUM = "45.7,0.6,-1.2,8.3,-4.0,-2.7,-5.1,-7.2,2.0,-3.1,1.1,-1.9,-0.6"


class WordSpotter(Protocol):
    """Listens for words that were given to it when it was made."""

    def begin(self) -> None:
        """Somebody has begun to speak: forget what was heard before."""

    def hears(self, pcm: Array) -> bool:
        """Take the next piece of 16 kHz PCM (N,); whether a word was heard by now."""


class SphinxSpotter:
    """Pocketsphinx's keyphrase search. Not thread-safe."""

    def __init__(
        self, words: Sequence[str], *, threshold_per_phone: float = _THRESHOLD_PER_PHONE
    ) -> None:
        """`words` may be phrases of several words, too; a lower threshold hears more.

        Raises SettingsError if pocketsphinx is not installed or does not know a word.
        """
        try:
            import pocketsphinx
        except ImportError as error:
            raise SettingsError(
                f"stop words need pocketsphinx ({error}); pip install 'deeptalk-edge[stop-words]'"
            ) from error
        self._decoder = pocketsphinx.Decoder(samprate=RATE_HZ, lm=None, loglevel="FATAL")
        with tempfile.NamedTemporaryFile("w", suffix=".kws") as phrases:
            for word in words:
                threshold = threshold_per_phone ** self._num_phones(word)
                phrases.write(f"{word.lower()} /{threshold}/\n")
            phrases.flush()
            self._decoder.add_kws("stop words", phrases.name)
        self._decoder.activate_search("stop words")
        self._decoder.start_utt()

    def begin(self) -> None:
        self._decoder.end_utt()
        self._decoder.set_cmn(_SPEECH_CEPSTRUM)
        self._decoder.start_utt()

    def hears(self, pcm: Array) -> bool:
        self._decoder.process_raw(as_int16(pcm).tobytes())
        return self._decoder.hyp() is not None

    def _num_phones(self, phrase: str) -> int:
        spoken = {word: self._decoder.lookup_word(word) for word in phrase.lower().split()}
        unknown = [word for word, phones in spoken.items() if phones is None]
        if unknown or not spoken:
            raise SettingsError(
                f"stop word {phrase!r}: expected English words of pocketsphinx's dictionary, found "
                f"{', '.join(unknown) or 'none'}; name another word"
            )
        return sum(len(phones.split()) for phones in spoken.values())
