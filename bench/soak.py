"""Hours of conversation on a virtual clock, with a fake model and a restless user.

The user asks, pauses, continues, interrupts, coughs, says "mhm" and unplugs the device at random.
The faults are: growing latency or memory, a state that never ends, sound of a turn that is over,
and a word in the history that was not heard. Every figure is simulated, and the output says so.
"""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge import host
from deeptalk_edge.bench.harness import arguments, measured
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort
from deeptalk_edge.runtime.events import (
    AnswerResumed,
    Interrupted,
    LiveEvent,
    SoundLost,
    TurnDone,
    TurnFailed,
)
from deeptalk_edge.runtime.loop.fake_talker import FRAME_SAMPLES as CODEC_FRAME_SAMPLES
from deeptalk_edge.runtime.loop.fake_talker import WORD_FRAMES, FakeTalker, level_of
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.runtime.loop.simulation import Simulation
from deeptalk_edge.runtime.loop.states import State

Array = NDArray[np.float32]

_FRAMES_PER_S = 50
_LONGEST_S = {State.RECOVERING: 20.0, State.USER_SPEAKING: 31.0}
_LONGEST_OTHER_S = 15.0  # longest stay in a state that has to end
_LOSSES_PER_S = 1 / 300
_FADE_S = 0.04  # after a stop
_ZEROS = 16  # most zero samples within sound: the last one of a fade
_WORD_SAMPLES = WORD_FRAMES * CODEC_FRAME_SAMPLES
_PEAK = 0.1  # level of the user's voice


class Threshold:
    """A detector that takes loud sound for a voice."""

    def is_voiced(self, frame: Array) -> bool:
        return bool(np.abs(frame).max() > _PEAK / 2)


class RestlessUser:
    """A microphone with a user who speaks in pauses and over answers."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._noise = np.random.default_rng(seed)
        self._plan: list[bool] = []  # future frames, voiced or not; the next one is last
        self._was = State.LISTENING
        self.state = State.LISTENING
        """State of the loop, to which the user reacts."""

    def __call__(self, start: int) -> Array:
        if self.state is not self._was or (self.state is State.LISTENING and not self._plan):
            self._react()
        voiced = self._plan.pop() if self._plan else False
        frame = self._noise.standard_normal(FRAME_SAMPLES, np.float32) * np.float32(0.002)
        if voiced:
            frame[:] += _PEAK
        elif self._random.random() < 0.002:
            frame[::16] += _PEAK  # a click
        return frame

    def _react(self) -> None:
        self._was, chance = self.state, self._random.random()
        if self.state is State.LISTENING and not self._plan:
            self._wait(0.1, 1.0)
            self._speak(0.4, 1.5)
            if chance < 0.3:  # a pause inside the sentence
                self._wait(0.12, 0.45)
                self._speak(0.2, 0.8)
        elif self.state is State.THINKING and chance < 0.1:
            self._speak(0.2, 0.8)
        elif self.state is State.SPEAKING and not self._plan:
            self._wait(0.05, 1.5)
            if chance < 0.25:
                self._speak(0.5, 1.5)
            elif chance < 0.40:
                self._speak(0.08, 0.22)  # mhm
            elif chance < 0.50:
                self._speak(0.28, 0.40)  # a cough

    def _wait(self, least_s: float, most_s: float) -> None:
        self._add(False, least_s, most_s)

    def _speak(self, least_s: float, most_s: float) -> None:
        self._add(True, least_s, most_s)

    def _add(self, voiced: bool, least_s: float, most_s: float) -> None:
        seconds = self._random.uniform(least_s, most_s)
        self._plan[:0] = [voiced] * round(seconds * _FRAMES_PER_S)


@dataclass(slots=True, kw_only=True)
class Report:
    """Results of a simulated conversation."""

    simulated_hours: float
    simulated_turns: int
    barge_ins: int
    resumed: int
    device_losses: int
    failures: int
    discarded_on_trial: int
    simulated_audible_ms_p50_first_quarter: float
    simulated_audible_ms_p50_last_quarter: float
    simulated_audible_ms_max: float
    memory_growth_kb: float
    """Growth of live Python objects after the first quarter."""
    longest_s: dict[str, float] = field(default_factory=dict)
    """Longest stay in each state."""
    foreign_samples: int = 0
    """Played samples that do not belong to the present turn."""
    unheard_words: int = 0
    """Words in the history that were not played."""
    wall_s: float = 0.0

    def faults(self) -> list[str]:
        """Return a description of each fault."""
        drift_ms = (
            self.simulated_audible_ms_p50_last_quarter - self.simulated_audible_ms_p50_first_quarter
        )
        wrong = {
            f"latency drifts by {drift_ms:.1f} ms": abs(drift_ms) > 20,
            f"memory grows by {self.memory_growth_kb:.0f} kB": self.memory_growth_kb > 500,
            f"{self.foreign_samples} samples of another turn": self.foreign_samples > 0,
            f"{self.unheard_words} words in the history were not heard": self.unheard_words > 0,
            f"{self.failures} turns failed": self.failures > 0,
        }
        for state, seconds in self.longest_s.items():
            longest_s = _LONGEST_S.get(State(state), _LONGEST_OTHER_S)
            wrong[f"{seconds:.1f} s in {state!r}"] = seconds > longest_s
        return [text for text, is_wrong in wrong.items() if is_wrong]


class Soak:
    """Runs the conversation and watches it."""

    def __init__(self, *, seed: int) -> None:
        self._random = random.Random(seed + 1)
        self._user = RestlessUser(seed)
        self._port = VirtualPort(self._user, on_played=self._watch_sound)
        lengths = random.Random(seed + 2)
        self.talker = FakeTalker(lambda turn: lengths.randint(6, 40))
        self._simulation = Simulation(
            self.talker,
            self._port,
            detector=Threshold(),
            # Ducking would change the levels that identify the turns.
            settings=LoopSettings(hangover_ms=300, duck_gain=1.0, forget_ms=60_000),
            step_ms=self.talker.step_ms,
            emit=self._take,
        )
        self._events: Counter[type[LiveEvent]] = Counter()
        self._audible_ms: list[float] = []
        self._played = Counter[int]()  # played samples of turns that are not over
        self._longest_s: dict[str, float] = {}
        self._state_since_s = 0.0
        self._foreign_samples = self._unheard_words = 0
        self._restore_at_s = float("inf")

    def run(self, *, hours: float, turns: int) -> Report:
        """Run until both limits are reached."""
        start_s = time.perf_counter()
        early_kb: float | None = None
        tracemalloc.start()
        while self._simulation.seconds < hours * 3600 or self._events[TurnDone] < turns:
            self._pass_frame()
            if early_kb is None and self._events[TurnDone] >= turns / 4:
                early_kb = _alive_kb()
        growth_kb = _alive_kb() - (early_kb or 0.0)
        tracemalloc.stop()
        quarter = max(len(self._audible_ms) // 4, 1)
        return Report(
            simulated_hours=self._simulation.seconds / 3600,
            simulated_turns=self._events[TurnDone],
            barge_ins=self._events[Interrupted],
            resumed=self._events[AnswerResumed],
            device_losses=self._events[SoundLost],
            failures=self._events[TurnFailed],
            discarded_on_trial=self.talker.num_discarded,
            simulated_audible_ms_p50_first_quarter=statistics.median(self._audible_ms[:quarter]),
            simulated_audible_ms_p50_last_quarter=statistics.median(self._audible_ms[-quarter:]),
            simulated_audible_ms_max=max(self._audible_ms),
            memory_growth_kb=growth_kb,
            longest_s=self._longest_s,
            foreign_samples=self._foreign_samples,
            unheard_words=self._unheard_words,
            wall_s=time.perf_counter() - start_s,
        )

    def _pass_frame(self) -> None:
        simulation, now_s = self._simulation, self._simulation.seconds
        if self._random.random() < _LOSSES_PER_S / _FRAMES_PER_S:
            self._port.lose()
            self._restore_at_s = now_s + self._random.uniform(0.2, 8.0)
        if now_s >= self._restore_at_s:
            self._port.restore()
            self._restore_at_s = float("inf")
        simulation.run(1 / _FRAMES_PER_S)
        state = simulation.loop.loop.state
        if state is not self._user.state:
            self._user.state, self._state_since_s = state, simulation.seconds
        if state is not State.LISTENING:
            stay_s = simulation.seconds - self._state_since_s
            self._longest_s[state.value] = max(self._longest_s.get(state.value, 0.0), stay_s)

    def _watch_sound(self, block: Array) -> None:
        """Check that every sample is silence, part of a fade, or of the present turn."""
        num_samples = int(np.count_nonzero(block))
        if not num_samples:
            return
        current = self.talker.num_turns
        self._played[current] += num_samples
        level = block.max()
        is_plain = np.count_nonzero(block == level) > 1  # the samples of a fade differ
        stay_s = self._simulation.seconds - self._state_since_s
        is_due = self._user.state in (State.SPEAKING, State.OVERLAP) or stay_s < _FADE_S
        if not is_due or (is_plain and float(level) != level_of(current)):
            self._foreign_samples += num_samples

    def _take(self, event: LiveEvent) -> None:
        self._events[type(event)] += 1
        if isinstance(event, TurnDone):
            assert event.voice is not None
            if event.voice.audible_ms is not None:
                self._audible_ms.append(event.voice.audible_ms)
            words = event.text.split()
            turn = self.talker.num_turns - 1
            assert all(word.startswith(f"{turn}.") for word in words)
            heard_words = (self._played.pop(turn, 0) + _ZEROS) // _WORD_SAMPLES
            self._unheard_words += max(len(words) - heard_words, 0)


def _alive_kb() -> float:
    gc.collect()
    return tracemalloc.get_traced_memory()[0] / 1024


def main(argv: list[str] | None = None) -> int:
    """Run, print a line of JSON, and fail if there are faults."""
    parser = arguments("soak", __doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--turns", type=int, default=2000, help="at least")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    with measured(args) as figures:
        report = Soak(seed=args.seed).run(hours=args.hours, turns=args.turns)
        figures.update({**asdict(report), "peak_resident_mb": host.peak_resident_mb()})
    for fault in report.faults():
        print(f"soak: {fault}", file=sys.stderr)
    return 1 if report.faults() else 0
