"""Does the loop know a whole question from a part of one?

Kiosk questions in voices that training never had, each of them whole and

falling     its first words, said as if they were a sentence
rising      its first words, said as if a comma followed
broken      the whole one's sound, broken off where it is quietest near a random place

and the recordings given, whole and broken. 100 ms of near-silence follow each, then both cues
judge: the melody, and how sure the model is of its first words. Parts that are questions themselves
are left out. Needs espeak-ng and flite.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bench.harness import BUNDLE, arguments, measured, spoken_questions
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.end_of_turn import HangoverSettings
from deeptalk_edge.runtime.audio.prosody import FinalLowering
from deeptalk_edge.runtime.conversation import Conversation, ConversationSettings
from deeptalk_edge.runtime.understanding import UnderstandingSettings
from deeptalk_edge.sound.wav import read_wav, resample
from deeptalk_edge.training.tiny.corpus import as_samples
from deeptalk_edge.training.tiny.domain import Question, questions
from deeptalk_edge.training.tiny.voices import held_out_voice, need_synthesisers, speak

Array = NDArray[np.float32]

_KINDS = ("whole", "falling", "rising", "broken")
_LEAD_S, _PAUSE_S = 0.3, 0.1
_NOISE = np.float32(0.0003)
_QUIET = 0.01  # level of what is no speech
_STEP = RATE_HZ // 100


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the cues say of one pause."""

    set_name: str
    kind: str
    melody_p: float
    text_log_p: float


def drawn_questions(num: int, rng: random.Random) -> list[Question]:
    """Some of each intent, none that only the checkpoint's own last report may score."""
    by_intent: dict[str, list[Question]] = {}
    for question in questions():
        if not question.is_test and len(question.text.split()) > 2:
            by_intent.setdefault(question.intent, []).append(question)
    drawn: list[Question] = []
    while len(drawn) < num:
        for intent in by_intent.values():
            drawn.append(intent.pop(rng.randrange(len(intent))))
        by_intent = {name: rest for name, rest in by_intent.items() if rest}
    return drawn[:num]


def clips_of(question: Question, rng: random.Random) -> Iterator[tuple[str, Array]]:
    """The question in some voice, whole and in parts, each with its kind."""
    known = {q.text for q in questions()}
    voice, words = held_out_voice(rng), question.text.split()
    whole = as_samples(speak(question.text, voice, rate_hz=RATE_HZ))
    yield "whole", whole
    yield "broken", broken_off(whole, rng)
    for kind, mark in (("falling", ""), ("rising", ",")):
        part = " ".join(words[: rng.randint(max(1, len(words) // 3), len(words) - 1)])
        if part not in known:
            yield kind, as_samples(speak(part + mark, voice, rate_hz=RATE_HZ))


def broken_off(pcm: Array, rng: random.Random) -> Array:
    """The first 30 to 85 % of (N,), up to the quietest 10 ms within 120 ms."""
    place = int(rng.uniform(0.3, 0.85) * len(pcm)) // _STEP
    power = (pcm[: len(pcm) // _STEP * _STEP].reshape(-1, _STEP) ** 2).mean(axis=1)
    first = max(place - 12, 10)
    return pcm[: (first + int(power[first : place + 12].argmin())) * _STEP]


def with_pause(pcm: Array) -> Array:
    """As the loop would cut it out."""
    loud = np.flatnonzero(np.abs(pcm) > _QUIET)
    margins = int(_LEAD_S * RATE_HZ), int(_PAUSE_S * RATE_HZ)
    heard = np.pad(pcm[loud[0] : loud[-1] + 1], margins)
    noise = np.random.default_rng(len(heard)).standard_normal(len(heard), np.float32)
    return heard + noise * _NOISE


def judge(talk: Conversation, set_name: str, kind: str, pcm: Array) -> Verdict:
    heard = with_pause(pcm)
    answer = talk.begin(heard)
    while answer.text_log_p is None and answer.advance() is not None:
        pass
    assert answer.text_log_p is not None
    verdict = Verdict(set_name, kind, FinalLowering().p_complete(heard), answer.text_log_p)
    answer.discard()
    return verdict


def rules() -> dict[str, tuple[float, float]]:
    """Ways to call a pause the end: the least `melody_p`, or the least `text_log_p`."""
    settings, never = HangoverSettings(), float("inf")
    sure = settings.confident_log_p
    assert sure is not None
    log_ps = sorted({-0.0005, -0.002, -0.005, sure}, reverse=True)
    return {
        f"melody {settings.complete_p}": (settings.complete_p, never),
        **{f"sure {log_p}": (never, log_p) for log_p in log_ps},
        "as shipped": (settings.complete_p, sure),
    }


def report(verdicts: list[Verdict]) -> Iterator[str]:
    """A table for each set: the share that each rule calls complete."""
    for set_name in dict.fromkeys(v.set_name for v in verdicts):
        own = [v for v in verdicts if v.set_name == set_name]
        kinds = [kind for kind in _KINDS if any(v.kind == kind for v in own)]
        counts = [f"{kind} {sum(v.kind == kind for v in own)}" for kind in kinds]
        yield f"\n{set_name + ', called complete':34}" + "".join(f"{c:>14}" for c in counts)
        for name, (least_p, least_log_p) in rules().items():
            is_over = [v.melody_p >= least_p or v.text_log_p >= least_log_p for v in own]
            shares = [
                np.mean([over for over, v in zip(is_over, own, strict=True) if v.kind == kind])
                for kind in kinds
            ]
            yield f"{name:34}" + "".join(f"{share:14.0%}" for share in shares)
        is_whole = np.array([v.kind == "whole" for v in own])
        for name in ("melody_p", "text_log_p"):
            scores = np.array([getattr(v, name) for v in own])
            for rate in (0.05, 0.1):
                bar = np.quantile(scores[~is_whole], 1 - rate, method="higher")
                share = np.mean(scores[is_whole] > bar)
                yield f"{f'{name} that {rate:.0%} of parts reach':34}{share:14.0%}"


def main(argv: list[str] | None = None) -> int:
    """Judge, print tables."""
    parser = arguments("end_of_turn", __doc__)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument(
        "--wav", type=Path, nargs="*", default=spoken_questions(), help="spoken ones"
    )
    parser.add_argument("--questions", type=int, default=110, help="to be synthesised")
    args = parser.parse_args(argv)
    with measured(args) as figures:
        need_synthesisers()
        bundle, rng = Bundle.open(args.bundle), random.Random(0)
        verdicts: list[Verdict] = []
        settings = replace(
            ConversationSettings.of(bundle, mode="text"),
            understanding=UnderstandingSettings(refuses=False),
        )
        with Conversation(bundle, settings) as talk:
            for wav in args.wav:
                pcm = resample(read_wav(wav), RATE_HZ).pcm
                verdicts.append(judge(talk, "recordings", "whole", pcm))
                for _ in range(2):
                    verdicts.append(judge(talk, "recordings", "broken", broken_off(pcm, rng)))
            for question in drawn_questions(args.questions, rng):
                for kind, pcm in clips_of(question, rng):
                    verdicts.append(judge(talk, "synthesised", kind, pcm))
        print(*report(verdicts), sep="\n")
        figures["verdicts"] = [asdict(verdict) for verdict in verdicts]
    return 0
