"""How good is the codec by itself? Its decoder against the recordings that its codes were made of.

sentences   whole sentences of the answer voice that the decoder never trained on
answers     answers that the language model never trains on, as the kiosk speaks them: unit by unit

Source: STOI, Taal et al. 2011; PESQ wide band, ITU-T P.862.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import soxr

from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.tiny.codec import HOLD_OUT_EVERY
from deeptalk_edge.training.tiny.corpus import ANSWER_RATE_HZ, Corpus, Samples, as_samples
from deeptalk_edge.training.tiny.domain import answers, answers_never_trained
from deeptalk_edge.training.tiny.evaluate import decode_frames
from deeptalk_edge.training.tiny.scorer import Recogniser, SpokenScore, score
from deeptalk_edge.training.tiny.tokens import Tokeniser
from deeptalk_edge.training.tiny.units import UnitVoice

_JUDGED_RATE_HZ = 16000  # of PESQ's wide band

Pairs = Iterator[tuple[str, Samples, Samples]]
"""Text, recording, and the recording's codes decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecScore:
    """One set of sentences, decoded from their true codes without noise."""

    name: str
    stoi: float
    pesq: float
    decoded: dict[str, SpokenScore]
    """What each recogniser, by name, makes of the decoded sound ..."""
    recorded: dict[str, SpokenScore]
    """... and of the recording itself: its own errors."""


def codec_quality(
    corpus: Corpus,
    tokeniser: Tokeniser,
    units: UnitVoice,
    codec: Snac,
    recognisers: dict[str, Recogniser],
    *,
    every: int = 1,
) -> list[CodecScore]:
    """Score the decoder on both sets; one sentence in `every`."""
    return [
        _score("sentences", list(_sentences(corpus, tokeniser, codec, every)), recognisers),
        _score("answers", list(_answers(units, codec, every)), recognisers),
    ]


def _sentences(corpus: Corpus, tokeniser: Tokeniser, codec: Snac, every: int) -> Pairs:
    for i in range(0, len(answers()), HOLD_OUT_EVERY * every):
        recorded = corpus.answers[i]
        decoded = decode_frames(codec, tokeniser.codes(recorded).numpy())
        yield corpus.answer_texts[i], recorded, decoded


def _answers(units: UnitVoice, codec: Snac, every: int) -> Pairs:
    for text in sorted(answers_never_trained())[:: 4 * every]:
        decoded = decode_frames(codec, units.answer_codes(text)[0])
        yield text, as_samples(units.answer_pcm(text)), decoded


def _score(
    name: str, pairs: list[tuple[str, Samples, Samples]], recognisers: dict[str, Recogniser]
) -> CodecScore:
    from pesq import pesq
    from pystoi import stoi

    texts = [text for text, _, _ in pairs]
    judged = []
    for _, recorded, decoded in pairs:
        length = min(len(recorded), len(decoded))
        a, b = (
            soxr.resample(x[:length], ANSWER_RATE_HZ, _JUDGED_RATE_HZ) for x in (recorded, decoded)
        )
        judged.append((stoi(a, b, _JUDGED_RATE_HZ), pesq(_JUDGED_RATE_HZ, a, b, "wb")))
    mean_stoi, mean_pesq = np.mean(judged, axis=0).tolist()
    return CodecScore(
        name=name,
        stoi=mean_stoi,
        pesq=mean_pesq,
        decoded={
            k: score(texts, [hear(y) for _, _, y in pairs]) for k, hear in recognisers.items()
        },
        recorded={
            k: score(texts, [hear(x) for _, x, _ in pairs]) for k, hear in recognisers.items()
        },
    )
