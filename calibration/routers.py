"""Fits the routers of a quantised model to the choices that the float model makes.

why       experts with rounding errors change what the routers of later layers see
rows      both models compute the float model's rows. A router's inputs x (C,) come from the
          quantised model, its wanted logits z (E,) from the float one
fit       W + (sum (z - W x) x^T) (sum x x^T + a I)^-1: ridge regression towards the router W
kept      of several a, and W itself, what chooses most of the float model's top-k experts on
          utterances that the fit has not seen; W wins ties

All layers are fitted from one replay. Memory: C^2 and E C sums a layer, and the rows held back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.corpus import Utterance
from deeptalk_edge.calibration.tape import Tape
from deeptalk_edge.calibration.taped_model import TapedModel
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.experts.routes import Ids, RouteRecorder

Array = NDArray[np.float32]
Floats = NDArray[np.float64]

PULLS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Weights of the trained router against the data, in units of the inputs' mean square."""

_HELD_BACK = 4  # one utterance in so many chooses the pull
_MOST_HELD_ROWS = 4096  # a layer


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedRouter:
    """One layer's router."""

    weight: Array | None
    """(E, C); None: the trained one is as good."""
    rows: int
    """That it was fitted on."""
    agreement: float
    """Share of the float model's choices that the trained router makes, on utterances held back."""
    fitted_agreement: float
    """The same for what is kept."""


class _InputRecorder(RouteRecorder):
    """Keeps the routers' inputs and choices by layer: (T, C) and (T, k) a call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, Array, Ids]] = []

    def routed(
        self,
        layer: int,
        ids: Ids,
        weights: Array,
        predicted: Ids | None,
        normed: Array | None = None,
    ) -> None:
        super().routed(layer, ids, weights, predicted)
        assert normed is not None
        self.calls.append((layer, normed.copy(), ids.copy()))


def _calls(model: TapedModel) -> list[tuple[int, Array, Ids]]:
    assert isinstance(model.recorder, _InputRecorder)
    return model.recorder.calls


class RouterFit:
    """Sums of one layer's rows."""

    def __init__(self, weight: Array) -> None:
        """`weight` (E, C) is the trained router."""
        self._weight = weight.astype(np.float64)
        width = weight.shape[1]
        self._gram: Floats = np.zeros((width, width))
        self._wrong: Floats = np.zeros(weight.shape)
        self._held: list[tuple[Floats, Ids]] = []
        self.num_rows = self._num_held = 0

    def add(self, x: Array, wanted: Array) -> None:
        """Fit on inputs (T, C); `wanted` (T, C) are the float model's, for the same rows."""
        inputs = x.astype(np.float64)
        self._gram += inputs.T @ inputs
        self._wrong += (self._weight @ (wanted.astype(np.float64) - inputs).T) @ inputs
        self.num_rows += len(x)

    def hold(self, x: Array, ids: Ids) -> None:
        """Hold rows back to choose by: inputs (T, C) and the float model's experts (T, k)."""
        room = _MOST_HELD_ROWS - self._num_held
        self._held.append((x[:room].astype(np.float64), ids[:room]))
        self._num_held += len(x[:room])

    def fitted(self) -> FittedRouter:
        """The router that agrees best on the rows held back."""
        trained = self._agreement(self._weight)
        best, weight = trained, None
        mean_square = float(np.trace(self._gram)) / len(self._gram)
        if self.num_rows and mean_square > 0:
            for pull in PULLS:
                ridge = self._gram + pull * mean_square * np.eye(len(self._gram))
                found = self._weight + np.linalg.solve(ridge, self._wrong.T).T
                agreement = self._agreement(found)
                if agreement > best:
                    best, weight = agreement, found.astype(np.float32)
        return FittedRouter(
            weight=weight, rows=self.num_rows, agreement=trained, fitted_agreement=best
        )

    def _agreement(self, weight: Floats) -> float:
        shared, count = 0, 0
        for x, ids in self._held:
            top_k = ids.shape[1]
            best = np.argpartition(-(x @ weight.T), top_k - 1, axis=1)[:, :top_k]
            shared += int((ids[:, :, None] == best[:, None, :]).sum())
            count += ids.size
        return shared / count if count else 1.0


def fit_routers(
    weights: Mapping[int, Array],
    input_scales: Mapping[int, Array],
    reference: Bundle,
    candidate: Bundle,
    utterances: Sequence[Utterance],
    *,
    threads: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, FittedRouter]:
    """Fit every router of a quantised bundle; `reference` is the float one.

    weights (E, C) are the checkpoint's routers by MoE layer; `input_scales` (C,) what the candidate
    divides their inputs by. Raises SettingsError if there are fewer than two utterances.
    """
    if len(utterances) < 2:
        raise SettingsError("fitting routers needs two measured utterances or more; give more")
    fits = {layer: RouterFit(weight) for layer, weight in weights.items()}
    with ExitStack() as opened:
        models = []
        for bundle in (reference, candidate):
            models.append(TapedModel(bundle, "ort", threads, seed, _InputRecorder))
            opened.callback(models[-1].talk.close)
        float_model, model = models
        for number, utterance in enumerate(utterances):
            progress(number, len(utterances))
            tape = Tape()
            float_model.ask(utterance, tape)
            model.replay(tape)
            is_held = number % _HELD_BACK == 1
            calls, float_calls = _calls(model), _calls(float_model)
            for (layer, x, _), (_, wanted, ids) in zip(calls, float_calls, strict=True):
                plain = x * input_scales[layer] if layer in input_scales else x
                if is_held:
                    fits[layer].hold(plain, ids)
                else:
                    fits[layer].add(plain, wanted)
    return {layer: fit.fitted() for layer, fit in fits.items()}
