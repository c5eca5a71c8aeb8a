"""Rules for the end of a turn and their costs: the wait after whole questions, and the share of
pauses inside questions that are taken for the end.

A rule waits for `long_ms` of silence, or for `incomplete_ms` if the melody indicates that more
comes. Once a cue says that the question is whole, `short_ms` are enough. A sweep tries all numbers,
chooses on one half of the pauses and reports the other half, then exchanges the halves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.audio.end_of_turn import (
    AdaptiveHangover,
    EndOfTurn,
    HangoverKind,
    open_end_of_turn,
)

Array = NDArray[np.float64]

SHARES = (0.05, 0.1)
"""Largest shares of the pauses inside questions that may be taken for the end."""
_LONG_MS = range(300, 2500, 50)
_SHORT_MS = (200, 300)
_NUM_LEAST = 25  # number of thresholds of a cue to try
_LATE = ((0.0, 0), *itertools.product((0.1, 0.2, 0.3), (1200, 1600, 2000)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """The silence after a question or inside one, with the values of the cues."""

    set_name: str
    kind: str
    number: int
    """Number of the question."""
    lasts_ms: float | None
    """Time until the speaker continues; None after a whole question."""
    cues: Mapping[str, float]
    """Values of the cues; a higher value makes a whole question more likely."""
    known_ms: Mapping[str, float]
    """Silence after which each cue is known."""
    is_whole: bool | None
    """The bundle's judgement of the question."""

    @property
    def is_end(self) -> bool:
        return self.lasts_ms is None


class Rule(NamedTuple):
    """A rule for the end of a turn."""

    long_ms: int
    cue: str | None = None
    least: float = 0.0
    """Threshold of the cue for a whole question."""
    short_ms: int = 200
    incomplete_p: float = 0.0
    """Threshold of the melody, below which more comes."""
    incomplete_ms: int = 0


class Cost(NamedTuple):
    """The costs of a rule on some pauses."""

    waits_ms: Array
    """Wait after each whole question."""
    cutoff_share: float


@dataclass(frozen=True, slots=True)
class Table:
    """Pauses as columns."""

    lasts_ms: Array
    """Lengths of the pauses (N); infinite after a whole question."""
    cues: Mapping[str, Array]
    known_ms: Mapping[str, Array]

    @classmethod
    def of(cls, pauses: Sequence[Pause]) -> Table:
        names = pauses[0].cues.keys()
        return cls(
            np.array([np.inf if p.lasts_ms is None else p.lasts_ms for p in pauses]),
            {name: np.array([p.cues[name] for p in pauses]) for name in names},
            {name: np.array([p.known_ms[name] for p in pauses]) for name in names},
        )

    def hangovers_ms(self, rule: Rule) -> Array:
        """Return the hangovers (N) of a rule."""
        wait = np.full(len(self.lasts_ms), float(rule.long_ms))
        if rule.incomplete_p:
            more_comes = self.cues["melody"] < rule.incomplete_p
            wait = np.where(more_comes, np.maximum(wait, rule.incomplete_ms), wait)
        if rule.cue is not None:
            enough = np.maximum(self.known_ms[rule.cue], rule.short_ms)
            is_whole = self.cues[rule.cue] >= rule.least
            wait = np.where(is_whole, np.minimum(wait, enough), wait)
        return wait

    def cost(self, hangovers_ms: Array) -> Cost:
        is_end = np.isinf(self.lasts_ms)
        cut = (hangovers_ms < self.lasts_ms)[~is_end]
        return Cost(hangovers_ms[is_end], float(cut.mean()))


def rules_of(cue: str | None, values: Array, *, late: bool) -> Iterator[Rule]:
    """Return every rule of the sweep with this cue; `late` also lets the melody lengthen the
    wait."""
    if cue is None:
        yield from map(Rule, _LONG_MS)
        return
    least = np.append(np.unique(np.quantile(values, np.linspace(0.02, 1, _NUM_LEAST))), np.inf)
    lates = _LATE if late else _LATE[:1]
    for bar, short, long, (p, ms) in itertools.product(least, _SHORT_MS, _LONG_MS, lates):
        yield Rule(long, cue, float(bar), short, p, ms)


def best_rule(pauses: Sequence[Pause], cue: str | None, share: float, *, late: bool) -> Rule:
    """Return the rule with the shortest mean wait that takes at most this share of the pauses for
    the end."""
    table = Table.of(pauses)
    values = table.cues[cue] if cue else np.empty(0)
    costs = {
        rule: table.cost(table.hangovers_ms(rule)) for rule in rules_of(cue, values, late=late)
    }
    fitting = [rule for rule, cost in costs.items() if cost.cutoff_share <= share]
    # Of equal waits the fewest cutoffs, and of those the highest threshold.
    return min(fitting, key=lambda r: (costs[r].waits_ms.mean(), costs[r].cutoff_share, -r.least))


def swept(pauses: Sequence[Pause], cue: str | None, share: float, *, late: bool) -> Cost:
    """Return the costs on each half of the rule that was chosen on the other half."""
    halves = [[p for p in pauses if p.number % 2 == half] for half in (0, 1)]
    waits, cutoffs, num_inside = [], 0.0, 0
    for own, other in (halves, halves[::-1]):
        table = Table.of(other)
        cost = table.cost(table.hangovers_ms(best_rule(own, cue, share, late=late)))
        inside = sum(not p.is_end for p in other)
        waits.append(cost.waits_ms)
        cutoffs += cost.cutoff_share * inside
        num_inside += inside
    return Cost(np.concatenate(waits), cutoffs / num_inside)


class _Told:
    """A cue with a known value."""

    def __init__(self, p: float) -> None:
        self._p = p

    def p_complete(self, utterance: NDArray[np.float32]) -> float:
        return self._p


def runtime_ms(
    pauses: Sequence[Pause], *, kind: HangoverKind = "adaptive", speculates: bool = True
) -> Array:
    """Return the runtime's hangovers, (N)."""
    waits = []
    for pause in pauses:
        rule = _runtime_rule(pause, kind, speculates)
        wait = float(rule.hangover_ms(np.empty(0, np.float32)))
        enough = rule.enough_ms(pause.cues["log p"], pause.is_whole) if speculates else None
        if enough is not None:
            wait = min(wait, max(enough, pause.known_ms["log p"]))
        waits.append(wait)
    return np.array(waits)


def _runtime_rule(pause: Pause, kind: HangoverKind, speculates: bool) -> EndOfTurn:
    knows_whole = speculates and pause.is_whole is not None
    rule = open_end_of_turn(kind, knows_whole=knows_whole)
    by_melody = isinstance(rule, AdaptiveHangover)
    return AdaptiveHangover(_Told(pause.cues["melody"])) if by_melody else rule
