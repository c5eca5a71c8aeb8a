"""An hour of noise on a virtual clock: counts the loop's wrong reactions.

Every minute has one noise of `bench/noise.py` and three spoken questions, so each kind comes five
times an hour. The real detectors, the end-of-turn cue and the loop process it; a talker without a
model answers every question for 4 s. As with a headset, the microphone does not hear the
loudspeaker, so every count is an effect of the noise.

level           level of the noise's loudest 200 ms below that of the questions; the same questions
                are also asked in a quiet room
false starts    utterances that open without a question
false stops     answers that stop without a question; most of them resume later
missed          questions that the model does not get from beginning to end, within half a second:
                unheard, cut, or joined with noise

false words     stop words found (`--stop-words`) over an answer without anyone saying one

No question is refused, so a false start is answered. The times are simulated, and the output says
so. It needs espeak-ng and flite.
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
"""The detector, and the level of the noise below the questions in dB; None without noise."""

MINUTE = 60 * RATE_HZ
_QUESTION_DBFS, _ROOM_DBFS = -26.0, -65.0
_QUESTIONS_S = (4.0, 23.0, 42.0)  # earliest starts in a minute; at most 6 s later
_VOICED = 0.01  # level at which a clean question's speech begins and ends
_SLACK = RATE_HZ // 2
_EARLY = RATE_HZ // 10  # a detector may open so long before the speech
_ANSWER_FRAMES = 48  # codec frames: 4.1 s


@dataclass(frozen=True, slots=True, kw_only=True)
class Minute:
    """The sounds of one minute."""

    kind: str
    noise: Array
    """Noise (MINUTE,); its loudest 200 ms have the level of the questions' loudest."""
    speech: Array
    """Questions (MINUTE,), with the room's noise."""
    questions: list[Span]
    """Start and end in samples of the hour."""


def make_minutes(
    recordings: Sequence[Array], num: int, *, seed: int, kinds: Sequence[str] = tuple(KINDS)
) -> Iterator[Minute]:
    """Make minutes with the kinds in turn; `recordings` are 16 kHz PCM of one question each."""
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
    """The loop's reactions to some minutes. Times are samples."""

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
        """Return the counts per hour of such minutes."""
        factor = 60 / self.minutes
        return {
            "false_starts": factor * self.false_starts,
            "false_stops": factor * self.false_stops,
            "missed": factor * self.missed,
            "false_words": factor * self.false_words,
        }


@dataclass(slots=True)
class Minutes:
    """Records events until `tally` counts them."""

    starts: list[int] = field(default_factory=list)
    """Starts of voices that opened an utterance or stopped an answer."""
    stops: list[int] = field(default_factory=list)
    utterances: list[Span] = field(default_factory=list)
    """First and last voice of the questions that the model got."""

    def tally(self, questions: Sequence[Span]) -> Tally:
        """Count the events of one minute with these questions."""

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
    """Counts the voices in which its spotter finds a word."""

    def __init__(self, spotter: WordSpotter) -> None:
        self._spotter, self._count = spotter, 0

    def begin(self) -> None:
        self._spotter.begin()

    def hears(self, pcm: Array) -> bool:
        """Count a found word; the loop does not call again for the same voice."""
        is_heard = self._spotter.hears(pcm)
        self._count += is_heard
        return is_heard

    def take_count(self) -> int:
        """Return the count since the last call."""
        count, self._count = self._count, 0
        return count


class Listener:
    """A loop with one detector, in noise of one level."""

    def __init__(
        self, detector: Detector, below_db: float | None, spotter: WordSpotter | None = None
    ) -> None:
        """`below_db` as in `Cell`; `spotter` searches for stop words."""
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
        """Run one minute."""
        # A microphone clips at 1.
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
    """Silence the loop's warnings of quiet questions, which most false starts cause."""
    log = logging.getLogger("deeptalk_edge")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _figures(cell: Cell, by_kind: Mapping[str, Tally]) -> dict[str, Any]:
    """Return the figures of an hour of all kinds, and the counts of each kind."""
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
