"""An hour of noise on a virtual clock: what it makes the loop do that nobody asked for.

Every minute has one noise of `bench/noise.py` and three spoken questions; so each kind comes five
times an hour. The real detectors, the end-of-turn cue and the loop hear it; a talker without a
model answers whatever it is asked for 4 s. The loudspeaker is not heard in the microphone, as with
a headset: what is counted is the noise's doing.

level           of the noise's loudest 200 ms below that of the questions; beside these levels the
                same questions are asked in a quiet room
false starts    utterances that open while nobody asks
false stops     answers that stop while nobody asks; most of them go on later
missed          questions that are not put to the model as they were asked, from their beginning to
                their end, within half a second: unheard, cut, or joined with noise

false words     stop words heard (`--stop-words`) where nobody said one, over an answer

Nothing is refused for what was said: a false start is answered. Simulated, and it says so. Needs
espeak-ng and flite.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bench.harness import arguments, measured, spoken_questions
from deeptalk_edge.bench.noise import KINDS, NOISE_DBFS, SPOKEN, make_noise
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.detectors import open_detector, silero_file
from deeptalk_edge.runtime.audio.end_of_turn import open_end_of_turn
from deeptalk_edge.runtime.audio.level import loud_dbfs
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES
from deeptalk_edge.runtime.audio.stop_words import SphinxSpotter, WordSpotter
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort
from deeptalk_edge.runtime.events import Interrupted, LiveEvent, SpeechEnded, SpeechStarted
from deeptalk_edge.runtime.loop.fake_talker import FakeTalker
from deeptalk_edge.runtime.loop.simulation import Simulation
from deeptalk_edge.sound.wav import read_wav, resample
from deeptalk_edge.training.tiny.voices import need_synthesisers

Array = NDArray[np.float32]
Detector = Literal["webrtc", "silero"]
Span = tuple[int, int]
Cell = tuple[Detector, float | None]
"""Who listens, and how far the noise is below the questions, in dB; None where there is none."""

MINUTE = 60 * RATE_HZ
_QUESTION_DBFS, _ROOM_DBFS = -26.0, -65.0
_QUESTIONS_S = (4.0, 23.0, 42.0)  # into a minute, and up to 6 s later
_VOICED = 0.01  # of a clean question, where its speech begins and ends
_SLACK = RATE_HZ // 2
_EARLY = RATE_HZ // 10  # that a detector may open before the recording counts as speech
_ANSWER_FRAMES = 48  # of the codec: 4.1 s


@dataclass(frozen=True, slots=True, kw_only=True)
class Minute:
    """What there is to hear in it."""

    kind: str
    noise: Array
    """(MINUTE,), its loudest 200 ms as loud as those of the questions."""
    speech: Array
    """(MINUTE,), with the room's own noise."""
    questions: list[Span]
    """Samples from the hour's beginning."""


def make_minutes(
    recordings: Sequence[Array], num: int, *, seed: int, kinds: Sequence[str] = tuple(KINDS)
) -> Iterator[Minute]:
    """Minutes with the kinds in turn; `recordings` are 16 kHz PCM of one question each."""
    rng = np.random.default_rng(seed)
    louder = np.float32(10 ** ((_QUESTION_DBFS - NOISE_DBFS) / 20))
    for number in range(num):
        speech = rng.standard_normal(MINUTE, np.float32) * np.float32(10 ** (_ROOM_DBFS / 20))
        questions = []
        for begin_s in _QUESTIONS_S:
            pcm = recordings[int(rng.integers(len(recordings)))]
            voiced = np.flatnonzero(np.abs(pcm) > _VOICED)
            start = round((begin_s + rng.uniform(0, 6)) * RATE_HZ)
            gain_db = _QUESTION_DBFS - loud_dbfs(pcm)
            speech[start : start + len(pcm)] += pcm * np.float32(10 ** (gain_db / 20))
            place = number * MINUTE + start
            questions.append((place + int(voiced[0]), place + int(voiced[-1]) + 1))
        kind = kinds[number % len(kinds)]
        noise = louder * make_noise(kind, seed + number, MINUTE / RATE_HZ)
        yield Minute(kind=kind, noise=noise, speech=speech, questions=questions)


@dataclass(slots=True)
class Tally:
    """What the loop made of some minutes. Times are samples."""

    minutes: int = 0
    questions: int = 0
    false_starts: int = 0
    false_stops: int = 0
    missed: int = 0
    false_words: int = 0

    def __iadd__(self, other: Tally) -> Tally:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self

    def an_hour(self) -> dict[str, float]:
        """What was counted, in an hour of such minutes."""
        factor = 60 / self.minutes
        return {
            "false_starts": factor * self.false_starts,
            "false_stops": factor * self.false_stops,
            "missed": factor * self.missed,
            "false_words": factor * self.false_words,
        }


@dataclass(slots=True)
class Minutes:
    """What happened, until `tally` counts it."""

    starts: list[int] = field(default_factory=list)
    """Where the voice began that opened an utterance, or stopped an answer."""
    stops: list[int] = field(default_factory=list)
    utterances: list[Span] = field(default_factory=list)
    """From the first voice to the last, of those that were put to the model."""

    def tally(self, questions: Sequence[Span]) -> Tally:
        """Count one minute with these questions."""

        def is_nobody_asking(moment: int) -> bool:
            return all(moment < start - _EARLY or moment > end for start, end in questions)

        def is_asked(question: Span) -> bool:
            return any(
                abs(question[0] - start) <= _SLACK and abs(question[1] - end) <= _SLACK
                for start, end in self.utterances
            )

        return Tally(
            minutes=1,
            questions=len(questions),
            false_starts=sum(map(is_nobody_asking, self.starts)),
            false_stops=sum(map(is_nobody_asking, self.stops)),
            missed=sum(not is_asked(question) for question in questions),
        )


class CountingSpotter:
    """Counts the voices in which its spotter hears a word."""

    def __init__(self, spotter: WordSpotter) -> None:
        self._spotter, self._count = spotter, 0

    def begin(self) -> None:
        self._spotter.begin()

    def hears(self, pcm: Array) -> bool:
        """The loop asks no more once a word was heard in a voice."""
        is_heard = self._spotter.hears(pcm)
        self._count += is_heard
        return is_heard

    def take_count(self) -> int:
        """Since the last call."""
        count, self._count = self._count, 0
        return count


class Listener:
    """A loop with one detector, in noise at one level."""

    def __init__(
        self, detector: Detector, below_db: float | None, spotter: WordSpotter | None = None
    ) -> None:
        """`below_db` as in `Cell`; `spotter` listens for stop words."""
        self._spotter = CountingSpotter(spotter) if spotter else None
        self._gain = np.float32(0 if below_db is None else 10 ** (-below_db / 20))
        talker = FakeTalker(lambda turn: _ANSWER_FRAMES)
        self._minute: Array = np.zeros(MINUTE, np.float32)
        self._happened = Minutes()
        self._simulation = Simulation(
            talker,
            VirtualPort(self._hear),
            detector=open_detector(detector),
            end_of_turn=open_end_of_turn(),
            spotter=self._spotter,
            step_ms=talker.step_ms,
            emit=self._take,
        )

    def listen(self, minute: Minute) -> Tally:
        """Let a minute pass."""
        # A microphone cannot say more than 1.
        self._minute = np.clip(minute.speech + self._gain * minute.noise, -1, 1)
        self._happened = Minutes()
        self._simulation.run(MINUTE / RATE_HZ)
        tally = self._happened.tally(minute.questions)
        if self._spotter:
            tally.false_words = self._spotter.take_count()
        return tally

    def _hear(self, start: int) -> Array:
        start %= MINUTE
        return self._minute[start : start + FRAME_SAMPLES]

    def _take(self, event: LiveEvent) -> None:
        loop = self._simulation.loop.loop
        if isinstance(event, SpeechStarted):
            self._happened.starts.append(loop.opened)
        elif isinstance(event, Interrupted):
            self._happened.stops.append(loop.opened)
        elif isinstance(event, SpeechEnded):
            self._happened.utterances.append((loop.opened, loop.last_voice))


def main(argv: list[str] | None = None) -> int:
    """Run, print a table and a line of JSON."""
    parser = arguments("noise_hour", __doc__)
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument(
        "--levels", type=float, nargs="+", default=[20.0, 10.0, 0.0], help="dB below the questions"
    )
    parser.add_argument("--detectors", nargs="+", choices=("webrtc", "silero"))
    parser.add_argument("--stop-words", nargs="+", default=[])
    parser.add_argument("--stop-threshold", type=float, default=1e-3, help="per phone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if set(args.kinds) & set(SPOKEN):
        need_synthesisers()
    detectors = args.detectors or ["webrtc", *(["silero"] if silero_file() else [])]
    with measured(args) as figures, _without_warnings():
        recordings = [resample(read_wav(path), RATE_HZ).pcm for path in spoken_questions()]
        listeners = {
            (name, below_db): Listener(name, below_db, _spotter(args))
            for name in detectors
            for below_db in (None, *args.levels)
        }
        tallies = {cell: {kind: Tally() for kind in args.kinds} for cell in listeners}
        for minute in make_minutes(recordings, args.minutes, seed=args.seed, kinds=args.kinds):
            for cell, listener in listeners.items():
                tallies[cell][minute.kind] += listener.listen(minute)
        print(_table(tallies))
        figures["simulated"] = [_figures(cell, by_kind) for cell, by_kind in tallies.items()]
    return 0


def _spotter(args: argparse.Namespace) -> WordSpotter | None:
    if not args.stop_words:
        return None
    return SphinxSpotter(args.stop_words, threshold_per_phone=args.stop_threshold)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """The loop warns of every question that is too quiet, which most false starts are."""
    log = logging.getLogger("deeptalk_edge")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _figures(cell: Cell, by_kind: Mapping[str, Tally]) -> dict[str, Any]:
    """In an hour of all kinds, and each kind as it was counted."""
    total = _total(by_kind)
    return {
        "detector": cell[0],
        "below_db": cell[1],
        "questions": total.questions,
        "an_hour": total.an_hour(),
        "by_kind": {kind: asdict(tally) for kind, tally in by_kind.items()},
    }


def _total(by_kind: Mapping[str, Tally]) -> Tally:
    total = Tally()
    for tally in by_kind.values():
        total += tally
    return total


def _label(cell: Cell) -> str:
    detector, below_db = cell
    return f"{detector}, quiet" if below_db is None else f"{detector} -{below_db:.0f} dB"


def _table(tallies: Mapping[Cell, Mapping[str, Tally]]) -> str:
    def line(label: str, found: Sequence[Tally]) -> str:
        texts = [f"{t.false_starts} {t.false_stops} {t.missed}" for t in found]
        return f"{label:14}" + "".join(f"{text:>16}" for text in texts)

    columns, totals = list(tallies.values()), [_total(column) for column in tallies.values()]
    return "\n".join(
        [
            f"simulated: {totals[0].minutes} min, {totals[0].questions} questions in each column; "
            "false starts, false stops, missed questions",
            "",
            f"{'':14}" + "".join(f"{_label(cell):>16}" for cell in tallies),
            *(line(kind, [column[kind] for column in columns]) for kind in columns[0]),
            line("all", totals),
            "",
            f"{'false words':14}" + "".join(f"{total.false_words:>16}" for total in totals),
        ]
    )
