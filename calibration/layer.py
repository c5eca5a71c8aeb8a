"""Quantises the routed experts of one layer by a method, from the tokens that reach each.

rtn, mse              weights alone
awq                   folded input and hidden scales, then clipping weighed by the inputs
gptq                  error feedback along the inputs' Gram matrix
smoothquant           folded scales between int8 activations and weights, then round-to-nearest

Memory: one layer's tokens and one expert at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import ExpertWeights, RecordFormat
from deeptalk_edge.calibration.coverage import chosen_tokens, own_modality, router_scores
from deeptalk_edge.calibration.folds import FoldedCheckpoint, Folds
from deeptalk_edge.calibration.observe import LayerTokens
from deeptalk_edge.calibration.quantise import (
    dequantised,
    quantise_expert,
    quantise_int4,
    quantise_int8,
    with_scales,
)
from deeptalk_edge.calibration.ranges.channels import activation_aware, smoothing
from deeptalk_edge.calibration.ranges.clipping import clipped, grams_of_groups
from deeptalk_edge.calibration.ranges.gptq import error_feedback
from deeptalk_edge.checkpoint.reader import Checkpoint

Array = NDArray[np.float32]
Method = Literal["rtn", "mse", "awq", "gptq", "smoothquant"]
METHODS: tuple[Method, ...] = ("rtn", "mse", "awq", "gptq", "smoothquant")

_SEARCHED_TOKENS = 512  # an expert's tokens that a scale is searched on
_FITTED_TOKENS = 4096  # and that Gram matrices are made of
_SMOOTHING = 0.5
_SEARCHED_EXPERTS = 8  # of a layer, the busiest, that the shared input scale is searched on


class ExpertTokens(NamedTuple):
    """What one expert was given."""

    x: Array
    """(T, C), each row times the weight that its output gets: what it adds to the layer."""
    plain: Array
    """(T, C), as they are."""
    weights: Array
    """(T,)"""
    forced: int


@dataclass(frozen=True, slots=True)
class QuantisedExpert:
    """One expert, and how well it is held."""

    expert: int
    weights: ExpertWeights
    error: float
    """Of its outputs, relative: root of the mean square over that of the float outputs. 0 where no
    token reaches it."""
    input_most: float
    """The greatest |input|."""
    forced: int


class LayerTask:
    """The experts of one layer and their tokens."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layer: int,
        tokens: LayerTokens,
        audio_experts: Sequence[Sequence[int]],
        *,
        threshold: int,
    ) -> None:
        self._checkpoint, self.layer = checkpoint, layer
        self._spec = checkpoint.spec.decoder
        self._threshold, self._audio = threshold, audio_experts
        self._tokens = tokens
        self._x = np.asarray(tokens.x, np.float32)
        gate = checkpoint.tensor(f"model.layers.{layer}.mlp.gate.weight")
        self._scores = router_scores(self._x, gate)

    def tokens_of(self, expert: int, most: int = _FITTED_TOKENS) -> ExpertTokens:
        """An expert's tokens, forced ones included; evenly chosen of many."""
        own = own_modality(self._audio, self.layer - self._spec.num_dense_layers, expert)
        rows, weights, forced = chosen_tokens(
            self._tokens, self._scores, expert, own, self._threshold
        )
        if len(rows) > most:
            kept = np.linspace(0, len(rows) - 1, most).astype(np.int64)
            rows, weights = rows[kept], weights[kept]
        plain = self._x[rows]
        return ExpertTokens(plain * weights[:, None], plain, weights, forced)

    def matrices(self, expert: int, checkpoint: Checkpoint | None = None) -> tuple[Array, Array]:
        """`gate_up` (2G, C) and `down` (C, G)."""
        name = f"model.layers.{self.layer}.mlp.experts.{expert}"
        source = checkpoint or self._checkpoint
        gate, up, down = (source.tensor(f"{name}.{p}_proj.weight") for p in ("gate", "up", "down"))
        return np.concatenate([gate, up]), down

    def folds(self, method: Method, form: RecordFormat) -> Folds:
        """The layer's scales; empty for methods that fold none."""
        if method not in ("awq", "smoothquant"):
            return Folds()
        inputs = self._awq_inputs(form) if method == "awq" else self._smooth_inputs()
        hidden = [self._hidden_scales(method, expert, form) for expert in range(self.num_experts)]
        return Folds(inputs={self.layer: inputs}, hidden={self.layer: np.stack(hidden)})

    @property
    def num_experts(self) -> int:
        return self._spec.num_experts

    def quantise(
        self, method: Method, form: RecordFormat, folds: Folds, threads: int = 1
    ) -> Iterator[QuantisedExpert]:
        """Every expert in order, each in the precision of `form`; so many at once, which changes
        nothing of what they become.

        Raises ValueError if a weight cannot be held.
        """
        folded = FoldedCheckpoint(self._checkpoint, folds)
        lock = threading.Lock()  # a checkpoint is not thread-safe

        def one(expert: int) -> QuantisedExpert:
            tokens = self.tokens_of(expert)
            with lock:
                gate_up, down = self.matrices(expert, folded)
            scales = folds.inputs.get(self.layer)
            x = tokens.plain if scales is None else tokens.plain / scales
            weights = quantised_expert(method, form, gate_up, down, x, tokens.weights)
            held = form.dequantise(weights)
            some = slice(0, _SEARCHED_TOKENS)
            expected = _outputs(gate_up, down, x[some]) * tokens.weights[some, None]
            found = _outputs(*held, x[some]) * tokens.weights[some, None]
            most = float(np.abs(x).max(initial=0.0))
            error = _relative(found, expected)
            return QuantisedExpert(expert, weights, error, most, tokens.forced)

        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, self.num_experts, threads):  # no more than these in memory
                yield from pool.map(one, range(first, min(first + threads, self.num_experts)))

    def errors(self, forms: Sequence[RecordFormat]) -> list[float]:
        """The squared relative error of the busiest experts' outputs in each form, rounded to
        nearest: what a budget's search weighs."""
        found: list[list[float]] = [[] for _ in forms]
        for expert in self._busiest():
            tokens = self.tokens_of(expert, _SEARCHED_TOKENS)
            gate_up, down = self.matrices(expert)
            expected = _outputs(gate_up, down, tokens.plain) * tokens.weights[:, None]
            for place, form in zip(found, forms, strict=True):
                held = form.dequantise(quantise_expert(form, gate_up, down))
                outputs = _outputs(*held, tokens.plain) * tokens.weights[:, None]
                place.append(_relative(outputs, expected) ** 2)
        return [float(np.mean(errors)) for errors in found]

    def _busiest(self) -> list[int]:
        counts = np.bincount(self._tokens.ids.ravel(), minlength=self.num_experts)
        busiest: list[int] = np.argsort(-counts, kind="stable")[:_SEARCHED_EXPERTS].tolist()
        return busiest

    def _awq_inputs(self, form: RecordFormat) -> Array:
        """One vector for all that read the layer's normed input, (C,)."""
        sample = [
            (self.matrices(e)[0], self.tokens_of(e, _SEARCHED_TOKENS).x) for e in self._busiest()
        ]
        expected = [x @ gate_up.T for gate_up, x in sample]

        def error_of(scales: Array) -> float:
            total = 0.0
            for (gate_up, x), y in zip(sample, expected, strict=True):
                held = dequantised(*_rounded(gate_up * scales, form)) / scales
                total += float(np.square(x @ held.T - y).sum())
            return total

        return activation_aware(np.abs(self._x).mean(axis=0), error_of)

    def _smooth_inputs(self) -> Array:
        weights = [np.abs(self.matrices(e)[0]).max(axis=0) for e in range(self.num_experts)]
        return smoothing(np.abs(self._x).max(axis=0), np.max(weights, axis=0), _SMOOTHING)

    def _hidden_scales(self, method: Method, expert: int, form: RecordFormat) -> Array:
        """(G,) of one expert."""
        tokens = self.tokens_of(expert, _SEARCHED_TOKENS)
        gate_up, down = self.matrices(expert)
        hidden = hidden_values(gate_up, tokens.plain)
        if not len(hidden):
            return np.ones(down.shape[1], np.float32)
        if method == "smoothquant":
            return smoothing(np.abs(hidden).max(axis=0), np.abs(down).max(axis=0), _SMOOTHING)
        weighed = hidden * tokens.weights[:, None]
        expected = weighed @ down.T

        def error_of(scales: Array) -> float:
            held = dequantised(*_rounded(down * scales, form)) / scales
            return float(np.square(weighed @ held.T - expected).sum())

        return activation_aware(np.abs(weighed).mean(axis=0), error_of)


def hidden_values(gate_up: Array, x: Array) -> Array:
    """silu(gate x) * up x of inputs (T, C): (T, G)."""
    gate, up = np.split(x @ gate_up.T, 2, axis=1)
    return np.asarray(gate / (1 + np.exp(-np.clip(gate, -80, None))) * up)


def _outputs(gate_up: Array, down: Array, x: Array) -> Array:
    return hidden_values(gate_up, x) @ down.T


def _relative(found: Array, expected: Array) -> float:
    size = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / size if size else 0.0


def _rounded(weights: Array, form: RecordFormat) -> tuple[NDArray[np.int8], NDArray[np.floating]]:
    if form.group is None:
        return quantise_int8(weights)
    return quantise_int4(weights, form.group)


def quantised_expert(
    method: Method, form: RecordFormat, gate_up: Array, down: Array, x: Array, weights: Array
) -> ExpertWeights:
    """One expert; `x` (T, C) are its inputs as the folded checkpoint gives them."""
    if method in ("rtn", "smoothquant") or form.dtype not in ("int8", "int4"):
        return quantise_expert(form, gate_up, down)
    limit = 7 if form.group else 127
    gate_up_group, down_group = (form.group or m.shape[1] for m in (gate_up, down))
    if method == "mse" or not len(x):  # no token and no floor: weights alone, and it is reported
        return with_scales(clipped(gate_up, limit, gate_up_group), clipped(down, limit, down_group))
    inputs = x * weights[:, None]
    hidden = hidden_values(gate_up, x) * weights[:, None]
    if method == "gptq":
        return with_scales(
            error_feedback(gate_up, limit, gate_up_group, inputs.T @ inputs),
            error_feedback(down, limit, down_group, hidden.T @ hidden),
        )
    return with_scales(
        clipped(gate_up, limit, gate_up_group, grams_of_groups(inputs, gate_up_group)),
        clipped(down, limit, down_group, grams_of_groups(hidden, down_group)),
    )
