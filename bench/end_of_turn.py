"""Does the loop know a whole question from a part of one, and how long does it wait?

Kiosk questions in voices that training never had, each of them whole and

falling     its first words, said as if they were a sentence
rising      its first words, said as if a comma followed
filler      its first words and "um"
broken      the whole one's sound, broken off where it is quietest near a random place

and the recordings given, whole and broken. Parts that are questions themselves are left out. After
each part the speaker pauses, for a time of a log-normal distribution (median 450 ms, half of them
300 to 675), at least 200 ms, before the rest. 100 ms into the pause every cue judges:

melody      the final pitch
log p       how sure the model is of its answer's first words
whole       the bundle's score that the question is whole
Smart Turn  `--turn-model`, a file of Smart Turn v3.2, which the package pipecat-ai contains

Needs espeak-ng and flite.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bench.harness import BUNDLE, arguments, measured, spoken_questions
from deeptalk_edge.bench.turn_rules import SHARES, Cost, Pause, Table, runtime_ms, swept
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.understanding.recordings import broken_off
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.end_of_turn import HangoverSettings, TurnCue
from deeptalk_edge.runtime.audio.prosody import FinalLowering
from deeptalk_edge.runtime.audio.smart_turn import SmartTurn
from deeptalk_edge.runtime.conversation import Conversation, ConversationSettings
from deeptalk_edge.runtime.understanding import ANSWER_ALL, Judge
from deeptalk_edge.sound.wav import read_wav, resample
from deeptalk_edge.training.tiny.corpus import as_samples
from deeptalk_edge.training.tiny.domain import Question, questions
from deeptalk_edge.training.tiny.voices import held_out_voice, need_synthesisers, speak

Array = NDArray[np.float32]

_KINDS = ("whole", "falling", "rising", "filler", "broken")
_LEAD_S, _PAUSE_S = 0.3, 0.1
_NOISE = np.float32(0.0003)
_QUIET = 0.01  # level of what is no speech
_MEDIAN_PAUSE_MS, _PAUSE_SIGMA, _LEAST_PAUSE_MS = 450.0, 0.6, 200.0


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
    if (part := broken_off(whole, rng)) is not None:
        yield "broken", part
    for kind, mark in (("falling", ""), ("rising", ","), ("filler", ", um,")):
        text = " ".join(words[: rng.randint(max(1, len(words) // 3), len(words) - 1)])
        if text not in known:
            yield kind, as_samples(speak(text + mark, voice, rate_hz=RATE_HZ))


def with_pause(pcm: Array) -> Array:
    """As the loop would cut it out."""
    loud = np.flatnonzero(np.abs(pcm) > _QUIET)
    margins = int(_LEAD_S * RATE_HZ), int(_PAUSE_S * RATE_HZ)
    heard = np.pad(pcm[loud[0] : loud[-1] + 1], margins)
    noise = np.random.default_rng(len(heard)).standard_normal(len(heard), np.float32)
    return heard + noise * _NOISE


def pause_ms(rng: random.Random) -> float:
    """How long a speaker pauses inside a question."""
    drawn = _MEDIAN_PAUSE_MS * float(np.exp(rng.gauss(0, _PAUSE_SIGMA)))
    return max(drawn, _LEAST_PAUSE_MS)


class Listener:
    """Judges pauses by every cue."""

    def __init__(self, talk: Conversation, judge: Judge, smart: Path | None) -> None:
        """`talk` refuses no question; `smart` is a file of Smart Turn."""
        self._talk, self._judge = talk, judge
        self._sounds: dict[str, TurnCue] = {"melody": FinalLowering()}
        if smart is not None:
            self._sounds["Smart Turn"] = SmartTurn(smart)

    def judge(
        self, set_name: str, kind: str, number: int, pcm: Array, lasts_ms: float | None
    ) -> Pause:
        """What the cues say 100 ms after `pcm` (N,), 16 kHz."""
        heard = with_pause(pcm)
        cues, known_ms = dict[str, float](), dict[str, float]()

        def note(name: str, start_s: float, value: float) -> None:
            cues[name] = value
            known_ms[name] = 1000 * (_PAUSE_S + time.perf_counter() - start_s)

        for name, cue in self._sounds.items():
            start_s = time.perf_counter()
            note(name, start_s, cue.p_complete(heard))
        start_s = time.perf_counter()
        answer = self._talk.begin(heard)
        while answer.text_log_p is None and answer.advance() is not None:
            pass
        assert answer.text_log_p is not None
        note("log p", start_s, answer.text_log_p)
        assert answer.features is not None
        assert answer.text_entropy is not None
        judgement = self._judge.of_features(answer.features)
        judgement.add_entropy(answer.text_entropy)
        if (whole_p := judgement.whole_p) is not None:
            cues["whole"] = whole_p
            known_ms["whole"] = known_ms["log p"]  # the answer has judged it by then
        answer.discard()
        return Pause(
            set_name=set_name,
            kind=kind,
            number=number,
            lasts_ms=lasts_ms,
            cues=cues,
            known_ms=known_ms,
            is_whole=judgement.is_whole,
        )


@contextmanager
def open_listener(bundle: Bundle, smart: Path | None = None) -> Iterator[Listener]:
    """Open a listener with its own conversation."""
    settings = replace(ConversationSettings.of(bundle, mode="text"), understanding=ANSWER_ALL)
    with Conversation(bundle, settings) as talk:
        yield Listener(talk, Judge(bundle, ANSWER_ALL), smart)


def recorded_pauses(
    listener: Listener, wavs: Sequence[Path], rng: random.Random
) -> Iterator[Pause]:
    """Each recording whole, and twice broken off."""
    for number, wav in enumerate(wavs):
        pcm = resample(read_wav(wav), RATE_HZ).pcm
        yield listener.judge("recordings", "whole", number, pcm, None)
        for part in (broken_off(pcm, rng), broken_off(pcm, rng)):
            if part is not None:
                yield listener.judge("recordings", "broken", number, part, pause_ms(rng))


def synthesised_pauses(listener: Listener, num: int, rng: random.Random) -> Iterator[Pause]:
    """So many questions, each whole and in parts."""
    for number, question in enumerate(drawn_questions(num, rng)):
        for kind, pcm in clips_of(question, rng):
            lasts_ms = None if kind == "whole" else pause_ms(rng)
            yield listener.judge("synthesised", kind, number, pcm, lasts_ms)


def report(pauses: Sequence[Pause]) -> Iterator[str]:
    """For each set the shares called complete; for all parts together the waits."""
    for set_name in dict.fromkeys(p.set_name for p in pauses):
        own = [p for p in pauses if p.set_name == set_name]
        yield from _shares(set_name, own)
        is_end = np.array([p.is_end for p in own])
        for name in own[0].cues:
            values = np.array([p.cues[name] for p in own])
            for rate in SHARES:
                bar = np.quantile(values[~is_end], 1 - rate, method="higher")
                share = np.mean(values[is_end] > bar)
                yield f"{f'{name} that {rate:.0%} of parts reach':34}{share:14.0%}"
    inside = [p.lasts_ms for p in pauses if p.lasts_ms is not None]
    yield f"\n{len(inside)} pauses inside questions, median {np.median(inside):.0f} ms"
    yield f"{'wait after a whole question, ms':34}" + "".join(
        f"{title:>10}" for title in ("mean", "p50", "p95", "cutoffs")
    )
    for name, cost in _costs(pauses):
        *waits, share = _figures(cost).values()
        yield f"{name:34}" + "".join(f"{wait:10.0f}" for wait in waits) + f"{share:10.1%}"


def _costs(pauses: Sequence[Pause]) -> Iterator[tuple[str, Cost]]:
    """Of every policy at every share."""
    yield "as shipped", Table.of(pauses).cost(runtime_ms(pauses))
    for name, cue, late in _policies(pauses[0].cues):
        for rate in SHARES:
            yield f"{name}, {rate:.0%}", swept(pauses, cue, rate, late=late)


def _policies(cues: Mapping[str, float]) -> Iterator[tuple[str, str | None, bool]]:
    """Name, cue and whether the melody lengthens the wait."""
    yield "voice detector alone", None, False
    for cue in cues:
        yield cue, cue, False
    if "whole" in cues:
        yield "whole, longer by melody", "whole", True


def _shares(set_name: str, own: Sequence[Pause]) -> Iterator[str]:
    kinds = [kind for kind in _KINDS if any(p.kind == kind for p in own)]
    counts = [f"{kind} {sum(p.kind == kind for p in own)}" for kind in kinds]
    yield f"\n{set_name + ', called complete':34}" + "".join(f"{c:>14}" for c in counts)
    unsure_ms = HangoverSettings().unsure_ms
    tests = {
        "the bundle's own score": np.array([bool(p.is_whole) for p in own]),
        "as shipped": runtime_ms(own) < unsure_ms,
    }
    for name, is_over in tests.items():
        shares = [np.mean(is_over[[p.kind == kind for p in own]]) for kind in kinds]
        yield f"{name:34}" + "".join(f"{share:14.0%}" for share in shares)


def _figures(cost: Cost) -> dict[str, float]:
    return {
        "mean_ms": float(cost.waits_ms.mean()),
        "p50_ms": float(np.median(cost.waits_ms)),
        "p95_ms": float(np.percentile(cost.waits_ms, 95)),
        "cutoff_share": cost.cutoff_share,
    }


def main(argv: list[str] | None = None) -> int:
    """Judge, print tables."""
    parser = arguments("end_of_turn", __doc__)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument(
        "--wav", type=Path, nargs="*", default=spoken_questions(), help="spoken ones"
    )
    parser.add_argument("--questions", type=int, default=110, help="to be synthesised")
    parser.add_argument("--turn-model", type=Path, help="a Smart Turn v3 file, to compare with")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with measured(args) as figures:
        need_synthesisers()
        rng = random.Random(args.seed)
        with open_listener(Bundle.open(args.bundle), args.turn_model) as listener:
            pauses = [
                *recorded_pauses(listener, args.wav, rng),
                *synthesised_pauses(listener, args.questions, rng),
            ]
        print(*report(pauses), sep="\n")
        figures["waits"] = {name: _figures(cost) for name, cost in _costs(pauses)}
        figures["pauses"] = [asdict(pause) for pause in pauses]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
