"""The ONNX Runtime backend: portable, exact, one engine per conversation.

bindings   every buffer of a decode step is bound once; only the cache's views change between steps
cache      past rows are bound as a prefix view, new rows are written in place after them
experts    run one by one on the rows that chose them, with weights bound in the pager's slot.
           Results are added in ascending id in float32, so no grouping changes a bit
tail       the last router's experts, the final norm and the head run on the last row only
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.lifetime import while_open
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.model.spec import DecoderSpec
from deeptalk_edge.runtime.backends.ort.graph import OrtBinding, OrtGraph
from deeptalk_edge.runtime.experts.paged import ExpertSum, PagedExperts
from deeptalk_edge.runtime.lm.cached_engine import CachedEngine
from deeptalk_edge.runtime.lm.engine import Logits
from deeptalk_edge.runtime.lm.kv_cache import KvCache

Array = NDArray[np.float32]

PREFILL_ROWS = 512
"""Rows of one prefill run; bounds the memory of the attention scores."""


class OrtEngine(CachedEngine[KvCache]):
    """The language model on ONNX Runtime. See `Engine`."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        context_rows: int,
        open_experts: Callable[[], PagedExperts],
        threads: int = 1,
    ) -> None:
        """Load the graphs and allocate the cache. The experts are opened last; the engine owns
        them.

        Raises ArtifactError if the bundle is for another backend or one of its files was changed,
        BackendError if a graph does not load.
        """
        manifest = bundle.manifest
        if manifest.target.backend not in ("ort", "cpu"):
            raise ArtifactError(
                f"{bundle.path}: made for the backend {manifest.target.backend}, this is ort; "
                "export the checkpoint again for this device"
            )
        bundle.check(manifest.spare_files)
        self._spec = decoder = manifest.model.decoder

        def load(name: str) -> OrtGraph:
            return OrtGraph(bundle.file(name), threads=threads)

        self._embed = load(manifest.ort_graphs.embed)
        self._segments = [load(name) for name in manifest.ort_graphs.segments]
        self._head = load(manifest.ort_graphs.head)
        expert = load(manifest.ort_graphs.expert)
        self._layers = [_cached_layers(segment) for segment in self._segments]
        super().__init__(
            KvCache(
                num_layers=decoder.num_layers, capacity=context_rows, width=decoder.cache_width
            ),
            self._give_back,
        )
        self.experts = open_experts()
        try:
            self._bind(bundle, expert)
        except BaseException:
            self.experts.close()
            raise

    def _bind(self, bundle: Bundle, expert: OrtGraph) -> None:
        decoder, vocabulary = self._spec, bundle.manifest.model.vocabulary
        self._experts = ExpertSum(expert.binding(), self.experts)
        self._num_columns = vocabulary.num_codebooks + 1
        self._no_features = np.zeros((1, decoder.width), np.float32)
        self._no_audio = np.zeros(1, np.bool_)
        self._tails = {items: self._tail(items, bundle) for items in (1, 2)}
        self._steps = {items: self._pass(items, 1) for items in (1, 2)}

    @while_open
    def latents(self, layer: int) -> Array:
        """A layer's cached rows (P, B, latent + rope): a view, valid until the next call."""
        return self._cache.past(layer)[1:]

    @while_open
    def prefill(self, rows: Ids, features: Array, audio_mask: NDArray[np.bool_]) -> None:
        self._check_prompt(features, audio_mask)
        self._cache.ahead(0, len(rows))  # refuse the whole prompt, not its end
        placed = np.zeros((len(rows), self._spec.width), np.float32)
        placed[audio_mask] = features
        for start in range(0, len(rows), PREFILL_ROWS):
            part = slice(start, start + PREFILL_ROWS)
            step = self._pass(1, len(rows[part]))
            self.experts.begin_prefill(audio_mask[part])
            self._run_layers(step, rows[part][None], placed[part], audio_mask[part])

    @while_open
    def decode_step(self, rows: Ids) -> Logits:
        self._check_step(rows)
        step = self._steps[self.num_items]
        self.experts.begin_step(self.num_items)
        self._run_layers(step, rows[:, None], self._no_features, self._no_audio)
        return self._tails[self._fed_items].run()

    @while_open
    def _last_logits(self) -> Logits:
        self._check_fed()
        return self._tails[self._fed_items].run()

    def _give_back(self) -> None:
        self._tails.clear()
        self._steps.clear()
        for graph in (self._embed, *self._segments, self._head):
            graph.close()
        self.experts.close()

    def _run_layers(
        self, step: _Pass, rows: Ids, features: Array, audio_mask: NDArray[np.bool_]
    ) -> None:
        """Run (B, T) rows to the last router, pass the last row to the tail, and count the rows."""
        num_items, num_rows = rows.shape[:2]
        cache = self._cache
        for layers, segment in zip(self._layers, step.segments, strict=False):
            for layer in layers:
                segment.feed(f"cache_{layer}", cache.past(layer))
                segment.fetch(f"new_{layer}", cache.ahead(layer, num_rows))
        step.rows[...], step.features[...], step.audio_mask[...] = rows, features, audio_mask
        step.embed.run()
        last = len(step.segments) - 1
        for index, segment in enumerate(step.segments):
            segment.run()
            if index < last:
                layer = self._spec.num_dense_layers + index
                self._experts.add_up(layer, step.cut, step.routed)
        cache.advance(num_rows)
        self._tails[num_items].cut.take_last(step.cut)
        self._fed_items = num_items

    def _pass(self, num_items: int, num_rows: int) -> _Pass:
        return _Pass(
            self._embed, self._segments[:-1], self._spec, num_items, num_rows, self._num_columns
        )

    def _tail(self, num_items: int, bundle: Bundle) -> _Tail:
        vocabulary = bundle.manifest.model.vocabulary
        logits = Logits(
            np.empty((num_items, vocabulary.text_size), np.float32),
            np.empty((num_items, vocabulary.num_codebooks, vocabulary.codebook_block), np.float32),
        )
        return _Tail(self._experts, self._segments[-1], self._head, self._spec, logits)


class _Cut:
    """A segment's outputs at its router, for B items of T rows."""

    def __init__(self, spec: DecoderSpec, num_items: int, num_rows: int) -> None:
        shape = (num_items, num_rows)
        self.residual = np.empty((*shape, spec.width), np.float32)
        self.normed = np.empty((*shape, spec.width), np.float32)
        self.expert_ids = np.empty((*shape, spec.top_k), np.int64)
        self.expert_weights = np.empty((*shape, spec.top_k), np.float32)

    def take_last(self, other: _Cut) -> None:
        """Copy the last row of `other`; this object has a single row."""
        self.residual[:, 0] = other.residual[:, -1]
        self.normed[:, 0] = other.normed[:, -1]
        self.expert_ids[:, 0] = other.expert_ids[:, -1]
        self.expert_weights[:, 0] = other.expert_weights[:, -1]

    def fetch_from(self, segment: OrtBinding) -> None:
        segment.fetch("residual", self.residual)
        segment.fetch("normed", self.normed)
        segment.fetch("expert_ids", self.expert_ids)
        segment.fetch("expert_weights", self.expert_weights)


class _Pass:
    """Buffers and bindings that run (B, T) rows from their ids to the last router."""

    def __init__(
        self,
        embed: OrtGraph,
        segments: Sequence[OrtGraph],
        spec: DecoderSpec,
        num_items: int,
        num_rows: int,
        num_columns: int,
    ) -> None:
        self.rows = np.empty((num_items, num_rows, num_columns), np.int64)
        self.features = np.empty((num_rows, spec.width), np.float32)
        self.audio_mask = np.empty(num_rows, np.bool_)
        self.cut = _Cut(spec, num_items, num_rows)
        self.routed = np.empty((num_items, num_rows, spec.width), np.float32)
        # A graph must not write its own input, so the residual alternates between two buffers.
        self._residuals = (np.empty_like(self.routed), self.cut.residual)
        self.embed = embed.binding()
        self.embed.feed("rows", self.rows)
        self.embed.feed("features", self.features)
        self.embed.feed("audio_mask", self.audio_mask)
        self.embed.fetch("x", self.routed)  # input of the first segment, which follows no router
        self.segments = [segment.binding() for segment in segments]
        last = len(segments) - 1
        for index, segment in enumerate(self.segments):
            self.cut.fetch_from(segment)
            if index == 0:
                segment.feed("x", self.routed)
            else:
                segment.feed("carried", self._residuals[(last - index) % 2])
                segment.feed("routed", self.routed)
            # The last segment writes to the tail's input.
            segment.fetch("residual", self._residuals[(last - index + 1) % 2])


class _Tail:
    """From the last router to the logits, one row of each item."""

    def __init__(
        self,
        experts: ExpertSum,
        segment: OrtGraph,
        head: OrtGraph,
        spec: DecoderSpec,
        logits: Logits,
    ) -> None:
        num_items = len(logits.text)
        self.cut = _Cut(spec, num_items, 1)
        self._experts, self._layer = experts, spec.num_layers - 1
        self._routed = np.empty((num_items, 1, spec.width), np.float32)
        self._hidden = np.empty((num_items, 1, spec.width), np.float32)
        self._logits = logits
        self._segment = segment.binding()
        self._segment.feed("carried", self.cut.residual)
        self._segment.feed("routed", self._routed)
        self._segment.fetch("hidden", self._hidden)
        self._head = head.binding()
        self._head.feed("hidden", self._hidden[:, 0])
        self._head.fetch("text_logits", logits.text)
        self._head.fetch("code_logits", logits.codes)

    def run(self) -> Logits:
        self._experts.add_up(self._layer, self.cut, self._routed)
        self._segment.run()
        self._head.run()
        return self._logits


def _cached_layers(segment: OrtGraph) -> list[int]:
    """Layers of a segment, read from the names of its outputs."""
    return [int(name[4:]) for name in segment.outputs if name.startswith("new_")]
