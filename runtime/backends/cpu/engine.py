"""The engine of the CPU backend: the whole decoder in our own kernels, int8 or int4 weights.

step       if every expert is resident, one call runs all layers; otherwise each call ends at a
           router, and the next one begins when the chosen experts are loaded
exactness  a row's logits do not depend on how rows were fed, on the number of threads, or on which
           experts were resident, because every sum has one order
precision  activations are rounded to int8 for every product, in blocks of 128; the cache holds
           bfloat16 or int8
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing
from ctypes import byref, c_char
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.lifetime import while_open
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.backends.cpu.cache import CpuCache
from deeptalk_edge.runtime.backends.cpu.library import (
    CpuContext,
    CpuLibrary,
    Span,
    Table,
    dense,
    span,
    span_of,
)
from deeptalk_edge.runtime.backends.cpu.weights import CpuWeights
from deeptalk_edge.runtime.lm.cached_engine import CachedEngine
from deeptalk_edge.runtime.lm.engine import Logits

Array = NDArray[np.float32]
Tables = NDArray[np.uint64]

PREFILL_ROWS = 256
"""Rows of one pass; bounds the memory of activations between layers."""


class ExpertTables(Protocol):
    """Source of an engine's experts."""

    @property
    def slot_bytes(self) -> int:
        """Readable bytes at each address."""

    def begin_prefill(self, audio_mask: NDArray[np.bool_]) -> None:
        """Rows of a prompt are fed; the mask (T,) marks rows of speech."""

    def begin_step(self, num_items: int) -> None:
        """One row of the answer is fed to each item."""

    def all_resident(self) -> AbstractContextManager[bool]:
        """Context of True if `addresses` of all layers hold every expert until it ends."""

    def addresses(self, layer: int) -> Tables:
        """Addresses (E,) of a layer's experts: a live view, always at the same place."""

    def tables(
        self, layer: int, ids: Ids, weights: Array, normed: Array
    ) -> Generator[Tables, None, None]:
        """Yield addresses (E,) of the experts of ids (N, k) in ascending groups, 0 for all others;
        each table is valid until the next one."""

    def close(self) -> None:
        """Release all memory."""


class CpuEngine(CachedEngine[CpuCache]):
    """The language model on our own CPU kernels. See `Engine`."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        context_rows: int,
        open_experts: Callable[[], ExpertTables],
        threads: int = 1,
        cache_kind: str = "bfloat16",
        path: str | None = None,
        library: CpuLibrary | None = None,
    ) -> None:
        """Load the weights and reserve the cache. The experts are opened last; the engine owns
        them.

        `path` names one of the library's kernel paths; the default is the processor's best one.

        Raises ArtifactError if the bundle is not for this backend, is damaged, or holds a model
        that the kernels do not take, BackendError if the library does not load, DoesNotFit if
        there is not enough memory.
        """
        self._context = CpuContext(library or CpuLibrary(), path=path, threads=threads)
        try:
            self._load(bundle, context_rows, cache_kind, open_experts)
        except BaseException:
            self._context.close()
            raise

    def _load(
        self,
        bundle: Bundle,
        context_rows: int,
        cache_kind: str,
        open_experts: Callable[[], ExpertTables],
    ) -> None:
        manifest = bundle.manifest
        self._spec = manifest.model
        decoder, vocabulary = self._spec.decoder, self._spec.vocabulary
        self._weights = CpuWeights(
            bundle.path, manifest.record_format, self._spec, manifest.record_format_of
        )
        super().__init__(
            CpuCache(
                num_layers=decoder.num_layers,
                capacity=context_rows,
                row_bytes=self._context.cache_row_bytes(
                    decoder.latent_dim, decoder.rope_dim, cache_kind
                ),
            ),
            self._give_back,
        )
        self._decoder: int | None = self._open_decoder(bundle, cache_kind)
        self._routed_at = (Span(), Span(), Span())
        self._fetch_routed = partial(
            self._calls.dt_routed, self._decoder, *map(byref, self._routed_at)
        )
        self._routed = self._open_routed()
        sizes = [vocabulary.text_size, vocabulary.num_codebooks * vocabulary.codebook_block]
        self._logits = np.empty((2, sum(sizes)), np.float32)
        codes = (vocabulary.num_codebooks, vocabulary.codebook_block)
        self._views = [
            Logits(
                self._logits[:items, : sizes[0]],
                self._logits[:items, sizes[0] :].reshape(items, *codes),
            )
            for items in (1, 2)
        ]
        self.experts = open_experts()
        try:
            self._note_tables()
        except BaseException:
            self.experts.close()
            raise

    def _note_tables(self) -> None:
        """Prepare the tables of stages without experts or with experts in waves, and the tables of
        a pass with every expert resident."""
        decoder = self._spec.decoder
        self._no_experts = np.zeros(decoder.num_experts, np.uint64)
        no_table = self._table(self._no_experts)
        self._no_tables = (Table * decoder.num_layers)(*[no_table] * decoder.num_layers)
        self._whole_tables = (Table * decoder.num_layers)(*[no_table] * decoder.num_layers)
        self._live = {layer: self.experts.addresses(layer) for layer in decoder.moe_layers}
        for layer, addresses in self._live.items():
            self._whole_tables[layer] = self._table(addresses)
        self._no_tables_at, self._whole_tables_at = map(
            span_of, (self._no_tables, self._whole_tables)
        )

    @property
    def kernel_path(self) -> str:
        """Instruction set in use, by the library's name."""
        return self._context.path

    @while_open
    def prefill(self, rows: Ids, features: Array, audio_mask: NDArray[np.bool_]) -> None:
        self._check_prompt(features, audio_mask)
        self._cache.next_rows(len(rows))  # refuse the whole prompt, not its end
        width = self._spec.decoder.width
        if features.shape != (len(features), width):
            raise ValueError(f"features of {features.shape}: expected {width} values each")
        placed = np.zeros((len(rows), width), np.float32)
        placed[audio_mask] = features
        for start in range(0, len(rows), PREFILL_ROWS):
            part = slice(start, start + PREFILL_ROWS)
            self.experts.begin_prefill(audio_mask[part])
            self._run(rows[None, part], placed[part], audio_mask[part])

    @while_open
    def decode_step(self, rows: Ids) -> Logits:
        self._check_step(rows)
        self.experts.begin_step(len(rows))
        self._run(rows[:, None], None, None)
        return self._head()

    @while_open
    def _last_logits(self) -> Logits:
        self._check_fed()
        return self._head()

    def _head(self) -> Logits:
        self._context.run("head", self._calls.dt_head, self._decoder, span(self._logits))
        return self._views[self._fed_items - 1]

    def _give_back(self) -> None:
        self._context.close()
        self.experts.close()

    def _open_decoder(self, bundle: Bundle, cache_kind: str) -> int:
        calls = self._calls = self._context.calls
        try:
            sizes = self._weights.sizes(
                cache_kind=cache_kind, cache_rows=self._cache.capacity, max_tokens=PREFILL_ROWS
            )
            return self._context.open(calls.dt_decoder_open, calls.dt_decoder_close, byref(sizes))
        except ValueError as error:
            raise ArtifactError(
                f"{bundle.path}: the native kernels refuse this model: {error}; export the bundle "
                "again, or choose the backend ort"
            ) from error

    def _open_routed(self) -> tuple[Ids, Array, Array]:
        """View the library's ids and weights (N, k) and normed rows (N, C), N the most tokens."""
        decoder = self._spec.decoder
        self._context.call(self._fetch_routed)
        ids, weights, normed = self._routed_at
        return (
            _array_at(ids, (PREFILL_ROWS, decoder.top_k), np.int64),
            _array_at(weights, (PREFILL_ROWS, decoder.top_k), np.float32),
            _array_at(normed, (PREFILL_ROWS, decoder.width), np.float32),
        )

    def _table(self, addresses: Tables) -> Table:
        num_experts = self._spec.decoder.num_experts
        return Table(dense(addresses, np.uint64, (num_experts,)), self.experts.slot_bytes)

    def _run(self, rows: Ids, features: Array | None, audio_mask: NDArray[np.bool_] | None) -> None:
        """Run (B, T) rows through all layers and count them."""
        num_items, num_rows = rows.shape[:2]
        where = self._cache.next_rows(num_rows)
        if rows.dtype.kind not in "iu":
            raise ValueError(f"rows of {rows.dtype}: expected ids, whole numbers")
        ids, columns = np.ascontiguousarray(rows, np.int64), self._spec.vocabulary.num_codebooks + 1
        mask = None if audio_mask is None else np.ascontiguousarray(audio_mask, np.bool_)
        self._context.run(
            "embed",
            self._calls.dt_begin,
            self._decoder,
            byref(where),
            dense(ids, np.int64, (num_items, num_rows, columns), "rows"),
            span(features),
            span(mask),
        )
        with self.experts.all_resident() as is_all_resident:
            if is_all_resident:
                self._stages(0, 2 * self._spec.decoder.num_layers, self._whole_tables_at)
            else:
                self._run_paged()
        self._cache.advance(num_rows)
        self._fed_items = num_items

    def _run_paged(self) -> None:
        decoder = self._spec.decoder
        ids, weights, normed = self._routed
        stage = 0
        for layer in decoder.moe_layers:
            self._stages(stage, 2 * layer + 1, self._no_tables_at)
            stage = 2 * layer + 1
            num_tokens = self._context.call(self._fetch_routed)  # the last layer has fewer
            routed = ids[:num_tokens], weights[:num_tokens], normed[:num_tokens]
            with closing(self.experts.tables(layer, *routed)) as tables:
                for table in tables:
                    is_live = table is self._live[layer]  # in nearly every step
                    where = self._whole_tables[layer] if is_live else self._table(table)
                    wave = self._calls.dt_wave, self._decoder, layer, byref(where)
                    self._context.run(f"experts of layer {layer}", *wave)
        self._stages(stage, 2 * decoder.num_layers, self._no_tables_at)

    def _stages(self, first: int, last: int, tables: Span) -> None:
        what = f"decoder from layer {first // 2} on"
        self._context.run(what, self._calls.dt_run, self._decoder, first, last, tables)


def _array_at(place: Span, shape: tuple[int, ...], dtype: type) -> NDArray[Any]:
    """View the library's memory; the values are valid until the next call."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    assert place.data is not None
    assert place.bytes >= size
    buffer = (c_char * size).from_address(place.data)
    array: NDArray[Any] = np.frombuffer(memoryview(buffer), dtype)
    return array.reshape(shape)
