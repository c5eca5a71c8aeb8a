"""Scores resident experts: the lowest is evicted first. Shared by the pager and the simulator.

lru         the time of the last use
decayed     an expert's share of its layer's last ten or so routings, and the recency of its last
            use
phased      the decayed uses of decoding plus half-weighted offline counts; while a question is
            heard and prefilled, experts that questions use score higher until their layer has run
pinned      any of these, with a set that is never evicted

Ages count per layer, not per pass; otherwise late layers would be evicted just before they run.

A policy sees keys (layer row * num_experts + expert), never a clock or a byte, so that a recording
gives the same decisions as the live run. `expected_score` is the score of a hinted expert: a hint
may evict only experts with a lower score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.int64]
Scores = NDArray[np.float64]

RECALL = 0.79
"""Accuracy of a look-ahead. Source: FATE on DeepSeek-V2-Lite, cited by BigMoeOnEdge."""

_KEPT = 0.9  # decay of a use with each later routing of its layer
_FRESH = 0.5  # decay of the recency score, likewise
_ALWAYS = 2.0  # the score of an expert that is always chosen
_PRIOR = 0.5  # weight of offline counts
_LISTEN_SCORE = 0.5
_NEXT_SCORE = 0.6  # score of an expert that certainly follows its layer's last choice
_LISTEN_FLOOR = 0.02  # experts used less often are not swept
_TURN_WEIGHT = 0.2  # weight of the newest question in the questions' uses


class Phase(Enum):
    """Phase of the conversation."""

    IDLE = "idle"
    LISTENING = "listening"
    THINKING = "thinking"
    SPEAKING = "speaking"


class Policy(Protocol):
    """Scores experts. One per pager; not thread-safe."""

    def begin(self, phase: Phase) -> None:
        """A pass of the model begins, or the conversation enters a phase."""

    def use(self, keys: Sequence[int]) -> None:
        """The router chose these experts of one layer."""

    def score(self, keys: Keys) -> Scores:
        """Return how much keeping each key saves; comparable within one policy."""

    def expected_score(self, key: int) -> float:
        """Return the score of an expert that is expected to be used next."""

    def sweep(self, num_slots: int) -> list[int]:
        """Return the keys to load before a question is prefilled, in layer order."""


class Lru:
    """The time of the last use."""

    def __init__(self, num_keys: int) -> None:
        self._last = np.zeros(num_keys)
        self._clock = 0

    def begin(self, phase: Phase) -> None:
        pass

    def use(self, keys: Sequence[int]) -> None:
        for key in keys:
            self._clock += 1
            self._last[key] = self._clock

    def score(self, keys: Keys) -> Scores:
        return self._last[keys]

    def expected_score(self, key: int) -> float:
        self._clock += 1
        self._last[key] = self._clock  # a hint counts as a use, or it would be evicted next
        return float(self._clock)

    def sweep(self, num_slots: int) -> list[int]:
        return []


class Decayed:
    """How often an expert's layer chose it recently, and how long ago the last time was."""

    def __init__(self, num_keys: int, num_experts: int) -> None:
        self._num_experts = num_experts
        num_rows = num_keys // num_experts
        # By layer, as lists, which are fast for single values: `use` runs at every layer of every
        # step, `score` only at a miss.
        self._times = [0] * num_rows  # routings of each layer
        self._unit = [1.0] * num_rows  # weight of a new use; it grows, old counts do not shrink
        self._uses = np.zeros(num_keys)
        self._last = np.full(num_keys, -np.inf)  # `_times` at the last use
        # The same memory as a view for single numbers, which `use` reads and writes faster.
        self._uses_of = self._uses.view(np.uint8).data.cast("d")
        self._last_of = self._last.view(np.uint8).data.cast("d")
        self._row: int | None = None  # layer routed last in this pass

    def begin(self, phase: Phase) -> None:
        self._row = None

    def use(self, keys: Sequence[int]) -> None:
        row = keys[0] // self._num_experts
        if row != self._row:  # otherwise a later wave of the same routing
            self._row = row
            self._times[row] += 1
            self._unit[row] /= _KEPT
            if self._unit[row] > 1e100:
                self._uses[row * self._num_experts : (row + 1) * self._num_experts] /= 1e100
                self._unit[row] /= 1e100
        time, unit = self._times[row], self._unit[row]
        uses_of, last_of = self._uses_of, self._last_of
        for key in keys:
            uses_of[key] += unit
            last_of[key] = time

    def score(self, keys: Keys) -> Scores:
        rows = keys // self._num_experts
        share = self._uses[keys] / np.take(self._unit, rows) * (1 - _KEPT)
        score: Scores = share + _FRESH ** (np.take(self._times, rows) - self._last[keys])
        return score

    def expected_score(self, key: int) -> float:
        return float(self.score(np.array([key]))[0]) + RECALL * _ALWAYS

    def sweep(self, num_slots: int) -> list[int]:
        return []


@dataclass(frozen=True, slots=True)
class UseCounts:
    """Use frequency of each expert, counted offline on recorded routes; (L, E) unless noted."""

    listen: NDArray[np.float64]
    """Share of the prefilled questions that use the expert."""

    speak: NDArray[np.float64]
    """Share of the decode steps that choose the expert."""

    succession: NDArray[np.float32] | None = None
    """(L, E, E): probability that j is chosen in the step after one that chose i."""


class Phased:
    """Scores by the uses of decoding; before and during a prefill, by those of questions."""

    def __init__(self, num_keys: int, num_experts: int, counts: UseCounts | None = None) -> None:
        self._num_keys, self._num_experts = num_keys, num_experts
        self._uses = Decayed(num_keys, num_experts)
        self._speak = np.zeros(num_keys) if counts is None else counts.speak.ravel() * _PRIOR
        self._listen = None if counts is None else counts.listen.ravel().copy()
        self._succession = None if counts is None else counts.succession
        self._next = np.zeros(num_keys)  # probability of each in its layer's next step
        self._touched = np.zeros(num_keys, np.bool_)
        self._phase = Phase.IDLE
        self._row = -1  # layer routed last; -1: before the first

    def begin(self, phase: Phase) -> None:
        self._uses.begin(phase)
        if phase is Phase.LISTENING:
            self._touched[:] = False  # earlier rows, such as a system prompt, are not a question
        if phase is Phase.SPEAKING and self._phase is Phase.THINKING:
            self._learn()
        self._phase, self._row = phase, -1

    def use(self, keys: Sequence[int]) -> None:
        self._row = keys[0] // self._num_experts
        if self._phase is Phase.THINKING:
            self._touched[list(keys)] = True
        else:
            self._uses.use(keys)
            if self._succession is not None:
                first = self._row * self._num_experts
                chosen = [key - first for key in keys]
                likely = self._succession[self._row, chosen].max(axis=0)
                self._next[first : first + self._num_experts] = _NEXT_SCORE * likely

    def score(self, keys: Keys) -> Scores:
        rows = keys // self._num_experts
        num_rows = self._num_keys // self._num_experts
        steps_ahead = (rows - self._row - 1) % num_rows
        score: Scores = self._uses.score(keys) + self._speak[keys] - 1e-5 * steps_ahead
        if self._succession is not None:
            score += self._next[keys]
        if self._listen is not None and self._phase in (Phase.LISTENING, Phase.THINKING):
            listen = self._listen[keys]
            score += np.where((rows > self._row) & (listen > _LISTEN_FLOOR), listen, 0.0) * (
                _LISTEN_SCORE
            )
        return score

    def expected_score(self, key: int) -> float:
        return float(self.score(np.array([key]))[0]) + RECALL * _ALWAYS

    def sweep(self, num_slots: int) -> list[int]:
        if self._listen is None:
            return []
        best = np.argsort(-self._listen, kind="stable")[:num_slots]
        return sorted(int(key) for key in best if self._listen[key] > _LISTEN_FLOOR)

    def _learn(self) -> None:
        touched = self._touched.astype(np.float64)
        if self._listen is None:
            self._listen = touched
        else:
            self._listen += _TURN_WEIGHT * (touched - self._listen)
        self._touched[:] = False


class Pinned:
    """A policy that never evicts chosen keys."""

    def __init__(self, policy: Policy, keys: Iterable[int]) -> None:
        self._policy = policy
        self._keys = np.array(sorted(keys), np.int64)
        self.begin, self.use, self.sweep = policy.begin, policy.use, policy.sweep
        self.expected_score = policy.expected_score

    def score(self, keys: Keys) -> Scores:
        return np.where(np.isin(keys, self._keys), np.inf, self._policy.score(keys))


POLICIES: dict[str, Callable[[int, int, UseCounts | None], Policy]] = {
    "lru": lambda num_keys, _experts, _counts: Lru(num_keys),
    "decayed": lambda num_keys, num_experts, _counts: Decayed(num_keys, num_experts),
    "phased": Phased,
}
"""Constructors of policies by name, of (num_keys, num_experts, counts)."""
