"""Does the corpus reach every expert? What it reaches too little is topped up, and said.

own modality   of an audio expert: rows heard and spoken; of a text expert: written rows. A
               checkpoint without a split has one modality, all rows
routed         tokens that the model's own router sends to an expert
forced         tokens of its modality that are lent to an expert below the threshold, those with
               the best router score for it first; they serve its ranges and count for no floor

An expert below the floor of routed tokens fails the run: its ranges would rest on guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.calibration.observe import PHASES, LayerTokens
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.experts.routes import Modality

THRESHOLD = 256
"""Tokens below which an expert is topped up."""
FLOOR = 32
"""Routed tokens of its modality below which the run fails."""

_NAMED = 12  # experts in a message

SPEECH = (Modality.HEARD, Modality.SPOKEN)
_REMEDIES = {
    "audio": "record more spoken questions, whose answers are spoken too",
    "text": "add typed questions and longer answers",
    "any": "add questions of other kinds",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCoverage:
    """How one expert was reached."""

    layer: int
    expert: int
    own: str
    """Its own modality: `audio`, `text`, or `any` in a checkpoint without a split."""
    routed: int
    """Tokens of the expert's modality."""
    routed_all: int
    """Tokens of every modality."""
    forced: int
    """Lent tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Every expert, and what was required."""

    experts: tuple[ExpertCoverage, ...]
    floor: int
    threshold: int

    @property
    def below_floor(self) -> tuple[ExpertCoverage, ...]:
        return tuple(each for each in self.experts if each.routed < self.floor)

    @property
    def forced(self) -> tuple[ExpertCoverage, ...]:
        return tuple(each for each in self.experts if each.forced)

    def check(self) -> None:
        """Raises SettingsError naming the experts below the floor and what to record."""
        missing = self.below_floor
        if not missing:
            return
        named = ", ".join(
            f"layer {each.layer} expert {each.expert} ({each.own}, {each.routed})"
            for each in missing[:_NAMED]
        )
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        remedies = "; ".join(_REMEDIES[own] for own in sorted({each.own for each in missing}))
        raise SettingsError(
            f"{len(missing)} of {len(self.experts)} experts had fewer than {self.floor} routed "
            f"tokens of their modality: {named}{more}. To cover them {remedies}, or accept "
            "guessed ranges with a lower --floor"
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "floor": self.floor,
            "threshold": self.threshold,
            "experts": len(self.experts),
            "below_floor": [[e.layer, e.expert] for e in self.below_floor],
            "forced": [[e.layer, e.expert] for e in self.forced],
            "least_routed": min(e.routed for e in self.experts),
        }


def own_modality(audio_experts: Sequence[Sequence[int]], row: int, expert: int) -> str:
    """`audio` or `text`, by the checkpoint's split; `any` where it has none."""
    if not any(audio_experts):
        return "any"
    return "audio" if expert in audio_experts[row] else "text"


def is_own(own: str, modality: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which tokens (T,) are of an expert's own modality."""
    if own == "any":
        return np.ones(len(modality), np.bool_)
    is_speech = np.isin(modality, SPEECH)
    return is_speech if own == "audio" else ~is_speech


def routed_counts(counts: NDArray[np.int64], own: str) -> NDArray[np.int64]:
    """Of (..., modalities, phases) the tokens of one own modality, (...)."""
    assert counts.shape[-2:] == (len(Modality), len(PHASES))
    kinds = list(Modality) if own == "any" else list(SPEECH)
    if own == "text":
        kinds = [Modality.WRITTEN]
    return np.asarray(counts[..., kinds, :].sum(axis=(-1, -2)))


def chosen_tokens(
    tokens: LayerTokens,
    scores: NDArray[np.float32],
    expert: int,
    own: str,
    threshold: int,
) -> tuple[NDArray[np.int64], NDArray[np.float32], int]:
    """An expert's tokens: their rows, what weight the router gave each, and how many are forced.

    `scores` (T, E) are the router's. Forced tokens come last and weigh what their score is.
    """
    rows, places = (tokens.ids == expert).nonzero()
    weights = tokens.weights[rows, places]
    missing = threshold - len(rows)
    if missing <= 0:
        return rows, weights, 0
    free = is_own(own, tokens.modality)
    free[rows] = False
    others = np.flatnonzero(free)
    best = others[np.argsort(-scores[others, expert], kind="stable")[:missing]]
    best = np.sort(best)
    return (
        np.concatenate([rows, best]),
        np.concatenate([weights, scores[best, expert]]).astype(np.float32),
        len(best),
    )


def router_scores(x: NDArray[np.float32], gate: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax over all experts of tokens (T, C) by a router (E, C): (T, E)."""
    logits = x @ gate.T
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)
