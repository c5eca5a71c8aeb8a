"""An independent recogniser: pocketsphinx says which of the possible words an answer speaks.

It knows the words of the reference answers in any order and number, and nothing of the sentences:
what it hears was spoken. English alone; the extra `stop-words` or `evaluate` installs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

Array = NDArray[np.float32]

_RATE_HZ = 16000
_SILENCE_S = 0.2


class WordRecogniser:
    """Hears words of a given vocabulary. Not thread-safe."""

    def __init__(self, texts: Iterable[str], rate_hz: int) -> None:
        """Raises ValueError, with the reason, if it cannot be had or knows none of the words."""
        if find_spec("pocketsphinx") is None:
            raise ValueError("pocketsphinx is not installed: pip install 'deeptalk-edge[evaluate]'")
        import pocketsphinx  # type: ignore[import-untyped, unused-ignore]

        self._rate_hz = rate_hz
        self._decoder: Any = pocketsphinx.Decoder(samprate=_RATE_HZ, lm=None, loglevel="FATAL")
        words = sorted({word for text in texts for word in spelled(text)})
        known = [word for word in words if self._decoder.lookup_word(word)]
        if not known:
            raise ValueError("pocketsphinx knows none of the words of the answers")
        grammar = f"#JSGF V1.0;\ngrammar answers;\npublic <answer> = ( {' | '.join(known)} )+;\n"
        self._decoder.add_jsgf_string("answers", grammar)
        self._decoder.activate_search("answers")

    def __call__(self, pcm: Array) -> list[str]:
        """The words in PCM (N,)."""
        silence = np.zeros(int(self._rate_hz * _SILENCE_S), np.float32)
        heard = soxr.resample(np.concatenate([silence, pcm, silence]), self._rate_hz, _RATE_HZ)
        content = (np.clip(heard, -1, 1) * 32767).astype(np.int16).tobytes()
        self._decoder.start_utt()
        self._decoder.process_raw(content, full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return spelled(found.hypstr) if found else []


def spelled(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"[a-z']+", text.lower())


def word_errors(wanted: Sequence[str], found: Sequence[str]) -> int:
    """Words to insert, delete or replace: Levenshtein's distance."""
    row = list(range(len(found) + 1))
    for i, word in enumerate(wanted, 1):
        left, row[0] = row[0], i
        for j, other in enumerate(found, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (word != other))
    return row[-1]
