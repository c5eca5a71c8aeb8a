"""One pass of the float model over the corpus, on real routing, by the runtime's `ort` engine.

tokens      what the experts of a layer are given, (T, C), on disk, with their routing: everything
            that a quantiser wants is computed from these, a layer at a time
counts      tokens by layer, expert, modality and phase; of all tokens, stored or not
latents     the greatest value of every channel that the cache holds
routes      the passes as the pager sees them, for its popularity and succession

Answers are the checkpoint's own, so that rows of codec ids are covered too. Memory: a layer's
tokens live in a file and are mapped when needed; 16,384 tokens of the official width are 134 MB
a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.corpus import Utterance
from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.files import write_error
from deeptalk_edge.model.spec import DecoderSpec
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.events import TurnDone
from deeptalk_edge.runtime.experts.open import PagingSettings, recorded_routes
from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.runtime.experts.routes import Ids, Modality, RouteRecorder, Routes
from deeptalk_edge.runtime.lm.engine import Engine
from deeptalk_edge.runtime.settings import ConversationSettings
from deeptalk_edge.runtime.understanding import ANSWER_ALL

Array = NDArray[np.float32]

PHASES = (Phase.THINKING, Phase.SPEAKING)
"""A prompt is prefilled; rows of the answer are decoded."""


@dataclass(frozen=True, slots=True)
class LayerTokens:
    """What the experts of one layer were given. T tokens, k experts each."""

    x: Array
    """(T, C), mapped from its file."""
    ids: NDArray[np.int64]
    """(T, k)"""
    weights: Array
    """(T, k)"""
    modality: NDArray[np.uint8]
    """(T,), a `Modality`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What one pass over a corpus found."""

    tokens: dict[int, LayerTokens]
    """By MoE layer."""
    counts: NDArray[np.int64]
    """(L, E, modalities, phases), tokens that the router sent there."""
    latent_most: Array
    """(layers, latent), the greatest |value| of each cached channel."""
    routes: Routes
    num_answers: int
    unusable: dict[str, str]
    """Utterances that the model could not be asked, and why."""


class _Observer(RouteRecorder):
    """Counts and keeps what is routed. Tokens beyond `most` a layer are counted only; those that
    are kept are every n-th of each call, so that no utterance fills the store alone."""

    def __init__(self, spec: DecoderSpec, directory: Path, most: int, every: int) -> None:
        super().__init__()
        self._first, self._most, self._every = spec.num_dense_layers, most, every
        shape = (len(spec.moe_layers), spec.num_experts, len(Modality), len(PHASES))
        self.counts = np.zeros(shape, np.int64)
        self._files: dict[int, BinaryIO] = {
            layer: (directory / f"tokens_{layer:03d}.f32").open("wb") for layer in spec.moe_layers
        }
        self._kept: dict[int, list[tuple[Ids, Array, NDArray[np.uint8]]]] = {
            layer: [] for layer in spec.moe_layers
        }
        self._num_kept = dict.fromkeys(spec.moe_layers, 0)

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
        modality = self._modality[len(self._modality) - len(ids) :]
        phase = self.passes[-1].phase
        if phase in PHASES:
            for kind in Modality:
                np.add.at(
                    self.counts[layer - self._first, :, kind, PHASES.index(phase)],
                    ids[modality == kind].ravel(),
                    1,
                )
        stride = self._every if phase is Phase.THINKING else 1
        room = self._most - self._num_kept[layer]
        kept = slice(None, None, stride)
        rows = np.ascontiguousarray(normed[kept][:room], np.float32)
        if not len(rows):
            return
        self._files[layer].write(rows.data)
        part = ids[kept][:room].copy(), weights[kept][:room].copy(), modality[kept][:room].copy()
        self._kept[layer].append(part)
        self._num_kept[layer] += len(rows)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def tokens(self, spec: DecoderSpec) -> dict[int, LayerTokens]:
        """All that was kept, by layer, its inputs mapped."""
        found = {}
        for layer, parts in self._kept.items():
            count = self._num_kept[layer]
            ids, weights, modality = (
                np.concatenate([part[i] for part in parts])
                if parts
                else np.empty((0,) if i == 2 else (0, spec.top_k), kind)
                for i, kind in enumerate((np.int64, np.float32, np.uint8))
            )
            path = Path(self._files[layer].name)
            shape = (count, spec.width)
            x = np.memmap(path, np.float32, "r", shape=shape) if count else np.empty(shape, "f4")
            found[layer] = LayerTokens(x, ids, weights, modality)
        return found


def observe(
    bundle: Bundle,
    utterances: Sequence[Utterance],
    directory: Path,
    *,
    most_tokens: int = 16384,
    max_rows: int | None = None,
    threads: int = 1,
    seed: int = 0,
    pool: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Observation:
    """Ask the float model everything, each utterance in a new conversation.

    `directory` takes the tokens and must outlive what is returned; `pool` is how many experts are
    kept in memory, as for `run --pool`.

    Raises DoesNotFit if the disk fills, and what a conversation raises if it does not open.
    """
    spec = bundle.manifest.model.decoder
    settings = replace(
        ConversationSettings.of(bundle, seed=seed, threads=threads),
        backend="ort",
        paging=PagingSettings(pool=pool),
        understanding=ANSWER_ALL,
    )
    if max_rows is not None:
        settings = replace(settings, max_rows=max_rows)
    observer = _Observer(spec, directory, most_tokens, every=_stride(len(utterances), most_tokens))
    engines: list[OrtEngine] = []

    def tap(engine: Engine) -> Engine:
        assert isinstance(engine, OrtEngine)
        engine.experts.recorder = observer
        engines.append(engine)
        return engine

    latent_most = np.zeros((spec.num_layers, spec.latent_dim), np.float32)
    unusable: dict[str, str] = {}
    num_answers = 0
    try:
        with Conversation(bundle, settings, tap=tap) as talk:
            for number, utterance in enumerate(utterances):
                progress(number, len(utterances))
                try:
                    num_answers += _ask(talk, utterance)
                except DoesNotFit as error:  # of this question: it is too long
                    unusable[utterance.name] = str(error)
                _note_latents(engines[0], latent_most)
    except OSError as error:
        raise write_error(directory, error) from error
    finally:
        observer.close()
    return Observation(
        tokens=observer.tokens(spec),
        counts=observer.counts,
        latent_most=latent_most,
        routes=recorded_routes(bundle, observer),
        num_answers=num_answers,
        unusable=unusable,
    )


def _ask(talk: Conversation, utterance: Utterance) -> int:
    talk.reset()
    count = 0
    for turn in utterance.turns:
        count += sum(isinstance(event, TurnDone) for event in talk.ask(turn))
    return count


def _note_latents(engine: OrtEngine, most: Array) -> None:
    for layer in range(len(most)):
        rows = engine.latents(layer)
        if len(rows):
            values = np.abs(rows[..., : most.shape[1]]).max(axis=(0, 1))
            np.maximum(most[layer], values, out=most[layer])


def _stride(num_utterances: int, most: int) -> int:
    """Every how many prompt rows one is kept: a spoken question has 50 rows a second, and answers
    must find room too."""
    return max(1, num_utterances * 250 // max(most, 1))


def succession(routes: Routes) -> NDArray[np.float32]:
    """How likely expert j is chosen in the next decode step where i was chosen in this, the same
    layer: (L, E, E), float32. Rows that were never seen are zero."""
    rows = {layer: row for row, layer in enumerate(routes.layers)}
    size = (len(routes.layers), routes.num_experts)
    seen, followed = np.zeros(size), np.zeros((*size, routes.num_experts))
    before: dict[int, tuple[int, list[int]]] = {}
    for number, each in enumerate(routes.passes):
        if each.phase is not Phase.SPEAKING:
            before.clear()
            continue
        for call in each.calls:
            row, now = rows[call.layer], call.experts
            last, experts = before.get(row, (-2, []))
            if last == number - 1:
                seen[row, experts] += 1
                followed[row, np.array(experts)[:, None], now] += 1
            before[row] = (number, now)
    return np.asarray(followed / np.maximum(seen, 1)[:, :, None], np.float32)
