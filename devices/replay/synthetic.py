"""Synthetic routes of a spoken dialogue, for sizes without a recording.

    score(layer, expert, row) = popularity + topic of the turn + drift (AR(1)) + noise; top k win

The presets are fitted to the locality of recorded Qwen3, Gemma and OLMoE routes, not to DeepTalk:
what they say of a device is simulated twice over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.runtime.experts.routes import Call, Modality, Pass, Routes

Array = NDArray[np.float64]

_RHO_OF_TOPIC = 0.8
_STEP_HZ = 11.72  # one decode step is one SNAC frame
_FRAME_HZ = 50.0  # of heard rows


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterShape:
    """The statistics of a router; all in units of its scores."""

    zipf: float
    """Exponent of the experts' popularity."""
    topic: float
    """Spread of what a turn favours."""
    drift: float
    """Spread of what neighbouring rows share."""
    rho: float
    """How much of the drift the next row keeps."""
    noise: float
    """Spread of what each row has for itself."""


PRESETS = {
    "flat": RouterShape(zipf=0.30, topic=0.35, drift=0.40, rho=0.93, noise=1.2),
    "mid": RouterShape(zipf=0.45, topic=0.45, drift=0.95, rho=0.88, noise=1.0),
    "local": RouterShape(zipf=0.55, topic=0.55, drift=0.75, rho=0.93, noise=0.8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogueShape:
    """Sizes of the model and of the talk; the defaults are DeepSeek-V2-Lite's."""

    num_layers: int = 26
    num_experts: int = 64
    top_k: int = 6
    record_bytes: int = 4_595_712
    """int4, groups of 64."""
    num_turns: int = 8
    question_s: float = 3.0
    answer_s: float = 5.0
    num_audio_experts: int = 20
    """Per layer: a run name of DeepTalk's authors says so."""
    wall: float = 4.0
    """Handicap of the other experts for a heard row; 4 nearly parts them, 1.5 does not."""
    recall: float = 0.79
    """Share of a row's experts that a look-ahead finds."""


def synthetic_routes(preset: str, shape: DialogueShape, *, seed: int = 0) -> Routes:
    """Routes of a dialogue. Same preset, shape and seed, same routes."""
    router = PRESETS[preset]
    random = np.random.default_rng(seed)
    size = (shape.num_layers, shape.num_experts)
    ranks = np.log(np.arange(1, shape.num_experts + 1))
    zipf = np.tile(-router.zipf * (ranks - ranks.mean()), (2, shape.num_layers, 1))
    popularity = random.permuted(zipf, axis=2)
    audio = np.tile(np.arange(shape.num_experts) < shape.num_audio_experts, (shape.num_layers, 1))
    is_audio = random.permuted(audio, axis=1)
    popularity[0] -= np.where(is_audio, 0.0, shape.wall)
    drift = random.normal(size=(2, *size)) * router.drift
    topic = random.normal(size=size) * router.topic
    blur = _blur(router, shape, random)
    passes: list[Pass] = []
    for turn in range(1, shape.num_turns + 1):
        topic = _RHO_OF_TOPIC * topic + 0.6 * random.normal(size=size) * router.topic
        stretch = np.exp(0.4 * random.normal(size=2))
        num_heard = max(int(shape.question_s * stretch[0] * _FRAME_HZ), 8)
        num_steps = max(int(shape.answer_s * stretch[1] * _STEP_HZ), 16)
        passes.append(Pass(Phase.LISTENING, turn, 0))
        for kind, counts in ((Modality.HEARD, [num_heard]), (Modality.SPOKEN, [1] * num_steps)):
            side = 0 if kind is Modality.HEARD else 1
            for count in counts:
                scores = np.empty((count, *size))
                for row in range(count):
                    keep = np.sqrt(1 - router.rho**2) * router.drift
                    drift[side] = router.rho * drift[side] + keep * random.normal(size=size)
                    noise = router.noise * random.normal(size=size)
                    scores[row] = popularity[side] + topic + drift[side] + noise
                passes.append(_pass(scores, kind, turn, shape, blur, random))
    return Routes(
        layers=tuple(range(1, shape.num_layers + 1)),
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        record_bytes=shape.record_bytes,
        passes=passes,
        source=f"synthetic {preset}, wall {shape.wall:g}, seed {seed}",
    )


def _pass(
    scores: Array,
    kind: Modality,
    turn: int,
    shape: DialogueShape,
    blur: float,
    random: np.random.Generator,
) -> Pass:
    """Route rows of scores (N, L, E); decode steps look ahead, through a blur."""
    is_step = kind is Modality.SPOKEN
    each = Pass(Phase.SPEAKING if is_step else Phase.THINKING, turn, len(scores))
    ids = _top(scores, shape.top_k)
    gates = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights = np.take_along_axis(gates / gates.sum(axis=2, keepdims=True), ids, axis=2)
    guessed = _top(scores + blur * random.normal(size=scores.shape), shape.top_k)
    modality = np.full(len(scores), kind, np.uint8)
    none = np.empty((0, shape.top_k), np.int64)
    for row in range(shape.num_layers):
        looks = is_step and row + 1 < shape.num_layers
        each.calls.append(
            Call(
                row + 1,
                ids[:, row],
                weights[:, row].astype(np.float32),
                modality,
                guessed[:, row + 1] if looks else none,
            )
        )
    return each


def _blur(router: RouterShape, shape: DialogueShape, random: np.random.Generator) -> float:
    """The noise on scores at which a look-ahead has the recall of `shape`."""
    spread = np.sqrt(router.noise**2 + router.drift**2 + router.topic**2)
    scores = random.normal(size=(2000, shape.num_experts)) * spread
    noise = random.normal(size=scores.shape)
    chosen = _mask(_top(scores, shape.top_k), shape.num_experts)
    low, high = 0.0, 6.0
    for _ in range(20):
        middle = (low + high) / 2
        guess = _mask(_top(scores + middle * noise, shape.top_k), shape.num_experts)
        recall = (guess & chosen).sum() / chosen.sum()
        low, high = (middle, high) if recall > shape.recall else (low, middle)
    return low


def _top(scores: Array, top_k: int) -> NDArray[np.int64]:
    return np.argpartition(-scores, top_k - 1, axis=-1)[..., :top_k]


def _mask(ids: NDArray[np.int64], num_experts: int) -> NDArray[np.bool_]:
    mask = np.zeros((*ids.shape[:-1], num_experts), np.bool_)
    np.put_along_axis(mask, ids, True, axis=-1)
    return mask
