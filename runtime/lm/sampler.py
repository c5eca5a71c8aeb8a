"""Samples ids from logits, with a seed and independent of timing.

Every row draws K + 1 numbers from the generator, needed or not, so that an id depends only on the
seed, the turn and the logits. Text and codebooks each have a top-k; a top-k of 1 is greedy.

Source: DeepTalk `eval_qa.py`: top-k, then multinomial. Its repetition penalty is applied to a token
once per occurrence; ours is applied once, and `Penalty.AS_RELEASED` does what theirs does.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import BackendError, SettingsError
from deeptalk_edge.model.noise import check_seed
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.model.spec import VocabularySpec

Array = NDArray[np.float32]


class Penalty(enum.Enum):
    """How often the repetition penalty applies to a text id."""

    ONCE = "once"
    """Once for each distinct id; never to ids that structure the grid."""

    AS_RELEASED = "as-released"
    """Once for each occurrence of any id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """Sampling parameters. Source: the checkpoint's generation config."""

    seed: int = 0
    text_top_k: int = 1
    audio_top_k: int = 1
    temperature: float = 1.0
    repetition_penalty: float = 1.0
    """Penalty on text ids that the answer has already; 1 turns it off."""
    penalty: Penalty = Penalty.ONCE

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.text_top_k < 1 or self.audio_top_k < 1:
            raise SettingsError("top_k: expected 1 (greedy) or more")
        if not self.temperature > 0:
            raise SettingsError(
                f"temperature = {self.temperature}: expected more than 0; for greedy set top_k = 1"
            )
        if not self.repetition_penalty > 0:
            raise SettingsError(
                f"repetition_penalty = {self.repetition_penalty}: expected more than 0, 1 is off"
            )


class Sampler:
    """Samples the ids of one answer, row by row."""

    def __init__(
        self, vocabulary: VocabularySpec, settings: SamplerSettings, *, turn: int = 0
    ) -> None:
        self._settings = settings
        self._random = np.random.default_rng([settings.seed, turn])
        self._said: Counter[int] = Counter()
        self._structural = {vocabulary.bos, vocabulary.eos, *vocabulary.text_specials.values()}
        self._codebooks = [f"codebook {i}" for i in range(vocabulary.num_codebooks)]

    def sample(self, text_logits: Array | None, code_logits: Array | None) -> tuple[int, Ids]:
        """Sample a text id from (V_text,) and un-shifted codes (K,) from (K, V_code).

        None means a stream whose ids the grid fixes; its ids are returned as 0.

        Raises BackendError, naming the stream, if its logits are not finite.
        """
        settings = self._settings
        draws = self._random.random(len(self._codebooks) + 1)
        text_id, code_ids = 0, np.zeros(len(self._codebooks), np.int64)
        if text_logits is not None:
            scores = self._penalised(text_logits)[None]
            text_id = int(self._choose(scores, settings.text_top_k, draws[:1], ["text"])[0])
            self._said[text_id] += 1
        if code_logits is not None:
            code_ids = self._choose(code_logits, settings.audio_top_k, draws[1:], self._codebooks)
        return text_id, code_ids

    def _penalised(self, logits: Array) -> Array:
        """Return the logits after the repetition penalty; the caller's array is not changed."""
        penalty = self._settings.repetition_penalty
        released = self._settings.penalty is Penalty.AS_RELEASED
        said = [i for i in self._said if released or i not in self._structural]
        if penalty == 1.0 or not said:
            return logits
        times = [self._said[i] if released else 1 for i in said]
        factors = np.power(penalty, times).astype(np.float32)
        struck = logits.copy()
        struck[said] = np.where(struck[said] > 0, struck[said] / factors, struck[said] * factors)
        return struck

    def _choose(
        self, logits: Array, top_k: int, draws: NDArray[np.float64], streams: list[str]
    ) -> Ids:
        """Sample one id for each row of the logits (R, V)."""
        if top_k == 1:
            ids: Ids = logits.argmax(axis=1)
            _check_finite(np.take_along_axis(logits, ids[:, None], axis=1), streams)
            return ids
        top_k = min(top_k, logits.shape[1])
        ids = np.argpartition(logits, -top_k, axis=1)[:, -top_k:]
        ids.sort(axis=1)  # the partition's order is not defined
        scores = np.take_along_axis(logits, ids, axis=1).astype(np.float64)
        peak = scores.max(axis=1, keepdims=True)
        _check_finite(peak, streams)
        cumulative = np.exp((scores - peak) / self._settings.temperature).cumsum(axis=1)
        picks = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(axis=1)
        chosen: Ids = np.take_along_axis(ids, picks[:, None], axis=1)[:, 0]
        return chosen


def _check_finite(best: NDArray[np.floating], streams: list[str]) -> None:
    """Check the best score (R, 1) of each stream; numpy orders NaN as largest, so it finds any
    NaN."""
    if np.isfinite(best).all():
        return
    broken = [s for s, ok in zip(streams, np.isfinite(best[:, 0]), strict=True) if not ok]
    raise BackendError(
        f"the logits of {', '.join(broken)} are not finite; verify the bundle with "
        "`deeptalk-edge bundle verify`"
    )
