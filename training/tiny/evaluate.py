"""How good is a kiosk? Spoken questions in, its text and its voice scored against the one right
answer.

text     every word as it should be
spoken   every word heard in the waveform, by the closed recogniser: the gate
agreed   heard is what was written, right or wrong
open     word errors of a recogniser that knows no grammar, beside the same for the true codes
         decoded

Text alone proves nothing about the voice: audio heads that know a thousand answers by heart score
.98 there and say another city. So held-out answers are scored, and by ear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from deeptalk_edge.progress import progress
from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.tiny.corpus import Corpus
from deeptalk_edge.training.tiny.domain import Split
from deeptalk_edge.training.tiny.scorer import Recogniser, SpokenScore, normalise, score
from deeptalk_edge.training.tiny.units import UnitVoice

Samples = npt.NDArray[np.float32]
Answerer = Callable[[Samples], tuple[str, Samples]]
"""Takes a question at 16 kHz; returns the answer's text and its sound at 24 kHz."""

HELD_OUT = (Split.NEW_VOICE, Split.NEW_COMBINATION, Split.BOTH_NEW)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetScore:
    """One held-out set. Rates are shares of its questions."""

    split: Split
    text_exact: float
    spoken: SpokenScore
    """By the closed recogniser."""

    agreed: float
    opened: SpokenScore
    """By the open recogniser, of some of the answers."""

    ceiling: SpokenScore
    """The same for the true codes of these answers: what no language model can better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """Exact rates that must be 0, or the closed recogniser hears what it wants to hear."""

    untrained_decoder: float
    shuffled_codes: float


def evaluate(
    answer: Answerer,
    corpus: Corpus,
    units: UnitVoice,
    codec: Snac,
    closed: Recogniser,
    opened: Recogniser,
    *,
    is_test: bool,
    every: int = 1,
    open_every: int = 1,
) -> list[SetScore]:
    """Score the validation halves of the held-out sets, or with `is_test` the halves that only the
    last report may use.

    One question in `every` is asked, once; of the answers the open recogniser reads one in
    `open_every`, for it is slow.
    """

    @cache
    def hear_truth(text: str) -> str:
        return opened(decode_frames(codec, units.answer_codes(text)[0]))

    scores = []
    for split in HELD_OUT:
        chosen = corpus.select(split, is_test=is_test)[::every]
        wanted = [normalise(corpus.utterances[i].answer) for i in chosen]
        texts, heard, heard_open = [], [], []
        for number, i in enumerate(progress(chosen, name=split.value, unit="question")):
            text, samples = answer(corpus.questions[i])
            texts.append(normalise(text))
            heard.append(closed(samples))
            if number % open_every == 0:
                heard_open.append(opened(samples))
        some = wanted[::open_every]
        scores.append(
            SetScore(
                split=split,
                text_exact=_share_equal(texts, wanted),
                spoken=score(wanted, heard),
                agreed=_share_equal(texts, heard),
                opened=score(some, heard_open),
                ceiling=score(some, [hear_truth(text) for text in some]),
            )
        )
    return scores


def run_controls(
    answers: Sequence[str], units: UnitVoice, codec: Snac, closed: Recogniser, *, seed: int = 0
) -> Controls:
    """Decode true codes with a decoder that was never trained, and shuffled codes with the real
    one."""
    torch.manual_seed(seed)
    rng, wanted = np.random.default_rng(seed), [normalise(text) for text in answers]
    untrained = Snac(codec.spec, with_encoder=False).eval()
    codes = [units.answer_codes(text)[0] for text in answers]
    shuffled = [rng.permuted(frames, axis=0) for frames in codes]
    return Controls(
        untrained_decoder=score(
            wanted, [closed(decode_frames(untrained, frames)) for frames in codes]
        ).exact_rate,
        shuffled_codes=score(
            wanted, [closed(decode_frames(codec, frames)) for frames in shuffled]
        ).exact_rate,
    )


@torch.inference_mode()
def decode_frames(codec: Snac, frames: npt.NDArray[np.int64]) -> Samples:
    """Codec frames (A, 7) to 24 kHz samples, without noise; no frames, no sound."""
    if not len(frames):
        return np.zeros(0, np.float32)
    device = next(codec.parameters()).device
    samples: Samples = codec.decode(torch.from_numpy(frames)[None].to(device))[0].cpu().numpy()
    return samples


def _share_equal(texts: Sequence[str], others: Sequence[str]) -> float:
    return float(np.mean([a == b for a, b in zip(texts, others, strict=True)]))
