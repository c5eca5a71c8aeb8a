"""Stop words: saying one over an answer ends the answer, however short the word is.

A spotter listens only while the user speaks over an answer; a word that it misses counts as any
other voice. The default is pocketsphinx's keyphrase search: English, a model inside the package, 3
% of real time. It holds the interpreter lock for 0.5 ms per 20 ms of sound, so it runs in its own
thread and not in the audio thread.
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

# Likelihood ratio per phone: 1e-12 for "stop". Higher misses more, lower finds the word in others.
_THRESHOLD_PER_PHONE = 1e-3
# The decoder's initial cepstral mean; its default is too far off for a single word. It is the mean
# over a question that espeak-ng speaks at -20 dBFS.
_SPEECH_CEPSTRUM = "45.7,0.6,-1.2,8.3,-4.0,-2.7,-5.1,-7.2,2.0,-3.1,1.1,-1.9,-0.6"


class WordSpotter(Protocol):
    """Finds the words that it was constructed with."""

    def begin(self) -> None:
        """The user has begun to speak: forget all earlier sound."""

    def hears(self, pcm: Array) -> bool:
        """Take the next piece of 16 kHz PCM (N,); True if a word was found since `begin`."""


class SphinxSpotter:
    """Pocketsphinx's keyphrase search. Not thread-safe."""

    def __init__(
        self, words: Sequence[str], *, threshold_per_phone: float = _THRESHOLD_PER_PHONE
    ) -> None:
        """`words` may be phrases; a lower threshold finds more.

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
