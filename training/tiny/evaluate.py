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

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.tiny.corpus import Corpus
from deeptalk_edge.training.tiny.domain import Split
from deeptalk_edge.training.tiny.scorer import Recogniser, normalise, score
from deeptalk_edge.training.tiny.units import UnitVoice

Samples = npt.NDArray[np.float32]
Answerer = Callable[[Samples], tuple[str, Samples]]
"""Takes a question at 16 kHz; returns the answer's text and its sound at 24 kHz."""

HELD_OUT = (Split.NEW_VOICE, Split.NEW_COMBINATION, Split.BOTH_NEW)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetScore:
    """One held-out set. Rates are shares of its questions."""

    split: Split
    num_questions: int
    text_exact: float
    spoken_exact: float
    spoken_error_rate: float
    """Word errors by the closed recogniser."""

    agreed: float
    open_error_rate: float | None
    """Word errors by the open recogniser, if there was one."""

    open_ceiling: float | None
    """The same for the true codes: what no language model can better."""


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
    *,
    opened: Recogniser | None = None,
    is_test: bool = False,
    every: int = 1,
) -> list[SetScore]:
    """Score the validation halves of the held-out sets, or with `is_test` the halves that only the
    last report may use; one question in `every`."""
    return [
        _score_set(answer, corpus, units, codec, closed, opened, split, is_test, every)
        for split in HELD_OUT
    ]


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


def _score_set(
    answer: Answerer,
    corpus: Corpus,
    units: UnitVoice,
    codec: Snac,
    closed: Recogniser,
    opened: Recogniser | None,
    split: Split,
    is_test: bool,
    every: int,
) -> SetScore:
    chosen = corpus.select(split, is_test=is_test)[::every]
    wanted = [normalise(corpus.utterances[i].answer) for i in chosen]
    texts, heard, heard_open = [], [], []
    for i in tqdm(chosen, desc=split.value, unit="question", mininterval=5):
        text, samples = answer(corpus.questions[i])
        texts.append(normalise(text))
        heard.append(closed(samples))
        if opened:
            heard_open.append(opened(samples))
    spoken = score(wanted, heard)
    ceiling = None
    if opened:
        true = [decode_frames(codec, units.answer_codes(text)[0]) for text in wanted]
        ceiling = score(wanted, [opened(samples) for samples in true]).word_error_rate
    return SetScore(
        split=split,
        num_questions=len(chosen),
        text_exact=float(np.mean([a == b for a, b in zip(texts, wanted, strict=True)])),
        spoken_exact=spoken.exact_rate,
        spoken_error_rate=spoken.word_error_rate,
        agreed=float(np.mean([a == b for a, b in zip(texts, heard, strict=True)])),
        open_error_rate=score(wanted, heard_open).word_error_rate if opened else None,
        open_ceiling=ceiling,
    )
