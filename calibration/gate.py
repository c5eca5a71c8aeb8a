"""The accuracy gate: the quantised bundle beside the float one, on utterances held out.

streams     both are fed the float answer's rows: KL divergence and greedy agreement of text and of
            every codebook, agreement of the routers' choices
answers     both answer by themselves: text beside the right one, or the float model's, and the word
            errors of the spoken answer, by an independent recogniser

Figures are means over utterances, paired; intervals are 95 %, by a seeded bootstrap over them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.calibration import Gate, Measure
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.corpus import Utterance
from deeptalk_edge.calibration.tape import Tape
from deeptalk_edge.calibration.taped_model import AskedUtterance, TapedModel
from deeptalk_edge.calibration.word_errors import plain, spelled, word_errors
from deeptalk_edge.devices.profile import GateLimits
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.lm.engine import Logits
from deeptalk_edge.sound.recogniser import WordRecogniser

Array = NDArray[np.float32]
Floats = NDArray[np.float64]

_RESAMPLES = 2000


@dataclass(slots=True)
class Streams:
    """One utterance, both models on the same rows: a figure a row."""

    text_kl: list[float] = field(default_factory=list)
    text_agrees: list[bool] = field(default_factory=list)
    code_kl: list[Floats] = field(default_factory=list)
    code_agrees: list[NDArray[np.bool_]] = field(default_factory=list)
    router: list[float] = field(default_factory=list)


def run_gate(
    reference: Bundle,
    candidate: Bundle,
    utterances: Sequence[Utterance],
    limits: GateLimits,
    *,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Gate:
    """Compare two bundles of one checkpoint.

    Raises SettingsError if there is nothing held out, and what a conversation raises.
    """
    if not utterances:
        raise SettingsError("the accuracy gate needs utterances that were held out; give more")
    with ExitStack() as opened:
        float_model = TapedModel(reference, "ort", threads, seed)
        opened.callback(float_model.talk.close)
        model = TapedModel(candidate, "auto", threads, seed)
        opened.callback(model.talk.close)
        streams, floats, found = [], [], []
        for number, utterance in enumerate(utterances):
            progress(number, len(utterances))
            tape = Tape()
            floats.append(float_model.ask(utterance, tape))
            steps = float_model.steps()
            streams.append(compared(tape, model.replay(tape), steps, model.steps()))
            found.append(model.ask(utterance))
        backend = model.talk.setup.backend
        rate_hz = model.rate_hz
    measures = _stream_measures(streams, limits, seed)
    measures |= _text_measures(utterances, floats, found, limits, seed)
    measures |= _spoken_measures(utterances, floats, found, limits, rate_hz, seed)
    rows = sum(len(each.code_kl) for each in streams)
    return Gate(utterances=len(utterances), rows=rows, backend=backend, measures=measures)


def compared(
    tape: Tape,
    found: Sequence[Logits],
    steps: Sequence[Sequence[NDArray[np.int64]]],
    found_steps: Sequence[Sequence[NDArray[np.int64]]],
) -> Streams:
    """One utterance: a taped answer's logits and routes beside another model's."""
    streams = Streams()
    for (has_text, one), other in zip(tape.logits, found, strict=True):
        if has_text:
            streams.text_kl.append(float(kl_divergence(one.text[-1], other.text[-1])))
            streams.text_agrees.append(bool(one.text[-1].argmax() == other.text[-1].argmax()))
        streams.code_kl.append(kl_divergence(one.codes[0], other.codes[0]))
        streams.code_agrees.append(one.codes[0].argmax(axis=-1) == other.codes[0].argmax(axis=-1))
    for step, other_step in zip(steps, found_steps, strict=True):
        for ids, others in zip(step, other_step, strict=True):
            shared = (ids[:, :, None] == others[:, None, :]).any(axis=2)
            streams.router.append(float(shared.mean()))
    return streams


def kl_divergence(reference: Array, found: Array) -> Floats:
    """KL(reference || found) of logits (..., V), in nats: (...)."""
    one, other = (_log_softmax(logits.astype(np.float64)) for logits in (reference, found))
    return np.asarray((np.exp(one) * (one - other)).sum(axis=-1))


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def interval(values: Sequence[float], seed: int) -> tuple[float, float]:
    """95 % of a mean over utterances, by bootstrap; deterministic."""
    rng, sample = np.random.default_rng(seed), np.asarray(values, np.float64)
    means = sample[rng.integers(0, len(sample), (_RESAMPLES, len(sample)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _measure(
    values: Sequence[Any], seed: int, limit: float | None = None, *, most: bool = True
) -> Measure:
    if not len(values):
        return Measure(value=None, reason="no row of this kind was held out", most=most)
    return Measure(
        value=float(np.mean(values)), interval=interval(values, seed), limit=limit, most=most
    )


def _stream_measures(
    streams: Sequence[Streams], limits: GateLimits, seed: int
) -> dict[str, Measure]:
    with_text = [each for each in streams if each.text_kl]
    with_router = [each for each in streams if each.router]
    measures = {
        "text_kl": _measure([np.mean(s.text_kl) for s in with_text], seed, limits.text_kl),
        "code_kl": _measure([np.mean(s.code_kl) for s in streams], seed, limits.code_kl),
        "text_agreement": _measure(
            [np.mean(s.text_agrees) for s in with_text], seed, limits.text_agreement, most=False
        ),
        "code_agreement": _measure(
            [np.mean(s.code_agrees) for s in streams], seed, limits.code_agreement, most=False
        ),
        "router_agreement": _measure(
            [np.mean(s.router) for s in with_router], seed, limits.router_agreement, most=False
        ),
    }
    for i in range(streams[0].code_kl[0].shape[0] if streams[0].code_kl else 0):
        kls = [np.mean([row[i] for row in s.code_kl]) for s in streams]
        agrees = [np.mean([row[i] for row in s.code_agrees]) for s in streams]
        measures[f"codebook_{i}_kl"] = _measure(kls, seed)
        measures[f"codebook_{i}_agreement"] = _measure(agrees, seed, most=False)
    return measures


def _text_measures(
    utterances: Sequence[Utterance],
    floats: Sequence[AskedUtterance],
    found: Sequence[AskedUtterance],
    limits: GateLimits,
    seed: int,
) -> dict[str, Measure]:
    same, right, right_float = [], [], []
    for utterance, one, other in zip(utterances, floats, found, strict=True):
        for text, other_text, answer in zip(one.texts, other.texts, utterance.answers, strict=True):
            same.append(float(plain(text) == plain(other_text)))
            if answer is not None:
                right.append(float(plain(other_text) == plain(answer)))
                right_float.append(float(plain(text) == plain(answer)))
    drop = [a - b for a, b in zip(right_float, right, strict=True)]
    return {
        "same_text": _measure(same, seed, most=False),
        "text_accuracy": _measure(right, seed, most=False),
        "text_accuracy_float": _measure(right_float, seed, most=False),
        "text_accuracy_drop": _measure(drop, seed, limits.text_accuracy_drop),
    }


def _spoken_measures(
    utterances: Sequence[Utterance],
    floats: Sequence[AskedUtterance],
    found: Sequence[AskedUtterance],
    limits: GateLimits,
    rate_hz: int,
    seed: int,
) -> dict[str, Measure]:
    names = ("spoken_word_errors", "spoken_word_errors_float", "spoken_word_errors_rise")
    wanted = [
        [spelled(answer or text) for answer, text in zip(u.answers, one.texts, strict=True)]
        for u, one in zip(utterances, floats, strict=True)
    ]
    try:
        hear = WordRecogniser((text for texts in wanted for text in texts), rate_hz)
    except SettingsError as error:
        return {name: Measure(value=None, reason=str(error)) for name in names}
    rates: tuple[list[float], list[float]] = ([], [])
    for texts, one, other in zip(wanted, floats, found, strict=True):
        if not any(texts):
            continue
        for place, asked in zip(rates, (other, one), strict=True):
            errors = [
                word_errors(hear.fold(text).split(), hear(pcm).split()) / len(text.split())
                for text, pcm in zip(texts, asked.sounds, strict=True)
                if text
            ]
            place.append(float(np.mean(errors)))
    rise = [a - b for a, b in zip(*rates, strict=True)]
    values = (rates[0], rates[1], rise)
    checks = (None, None, limits.word_error_rise)
    return {n: _measure(v, seed, c) for n, v, c in zip(names, values, checks, strict=True)}
