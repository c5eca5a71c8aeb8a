"""Our CPU decoder with random weights, and the read probe that figures are compared with.

Weights are in huge pages; experts are chosen at random, so that no processor cache helps that would
not help in a real conversation.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bench.cpu.sizes import Form
from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.runtime.backends.cpu.huge_pages import huge_array
from deeptalk_edge.runtime.backends.cpu.library import (
    CpuContext,
    CpuLibrary,
    DecoderSizes,
    Layer,
    Matrix,
    Pass,
    Span,
    Table,
    span,
    span_of,
)
from deeptalk_edge.runtime.backends.cpu.weights import decoder_sizes, record_of

PROBE_BYTES = 256 << 20
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuForm:
    """Form of the library's weights and the kernel path to measure."""

    group: int = 64
    """Weights per int4 scale; 0 means int8."""

    cache: str = "bfloat16"
    path: str | None = None
    """Kernel path; the processor's best one by default."""

    @property
    def stored(self) -> Form:
        bits = 4 + 16 / self.group if self.group else 8
        return Form(weight_bits=bits, cache_value_bytes=2 if self.cache == "bfloat16" else 1)


class ReadProbe:
    """Reads memory that no processor cache holds: the roofline."""

    def __init__(self, form: CpuForm, threads: Sequence[int]) -> None:
        self._contexts = _contexts(form, threads)
        self._memory = huge_array(PROBE_BYTES)
        self._memory[:] = 1

    def read(self, threads: int) -> None:
        self._contexts[threads].read(self._memory)


class CpuDecoder:
    """A decoder for each number of threads, with shared weights and cache."""

    def __init__(
        self, spec: ModelSpec, form: CpuForm, threads: Sequence[int], cache_rows: int
    ) -> None:
        self._weights = weights = _RandomWeights(spec, form.group)
        self._contexts = _contexts(form, threads)
        decoder, context = spec.decoder, self._contexts[threads[0]]
        row_bytes = context.cache_row_bytes(decoder.latent_dim, decoder.rope_dim, form.cache)
        self._cache = huge_array(decoder.num_layers * cache_rows * row_bytes)
        self._cache[:] = 0x3C  # about 0.01 as bfloat16 or as a scale
        self._frequencies = np.array(decoder.rope_frequencies(), np.float32)
        sizes = decoder_sizes(
            spec,
            cache_kind=form.cache,
            cache_rows=cache_rows,
            max_tokens=min(cache_rows, 512),
            rope_frequencies=span(self._frequencies),
            final_norm=span(weights.norm),
            table=weights.table,
            head=weights.table,
            layers=weights.layers,
        )
        self._decoders = {count: self._open(count, sizes) for count in threads}
        self._tables = (Table * decoder.num_layers)(
            *(Table(span(row), weights.record_bytes) for row in weights.tables)
        )
        self.logits = np.empty((1, spec.vocabulary.size), np.float32)
        """Logits of all heads for the last row."""
        self._random = np.random.default_rng(1)
        self._position = 0
        self.use(threads[0])

    def use(self, threads: int) -> None:
        self._context, self._decoder = self._contexts[threads], self._decoders[threads]

    def fill(self, position: int) -> None:
        """Set the number of cached rows; the cache is full of plausible values."""
        self._position = position

    def feed(self, num_rows: int) -> None:
        """Run rows after the cached ones and compute the logits of the last."""
        self._layers(num_rows, self._weights.spec.decoder.num_layers)
        self.heads()

    def first_layer(self) -> None:
        """Run the dense part of a step: the embedding and layer 0."""
        self._layers(1, 1)

    def heads(self) -> None:
        """Compute all logits of the last row."""
        context = self._context
        context.run("head", context.calls.dt_head, self._decoder, span(self.logits))

    def _layers(self, num_rows: int, num_layers: int) -> None:
        vocabulary = self._weights.spec.vocabulary
        ids = self._random.integers(0, vocabulary.size, (num_rows, vocabulary.num_codebooks + 1))
        where = Pass(Span(), (span(self._cache), Span()), 1, num_rows, self._position, 0)
        tables = span_of(self._tables)
        run, calls = self._context.run, self._context.calls
        nothing = Span(), Span()
        run("begin", calls.dt_begin, self._decoder, byref(where), span(ids), *nothing)
        run("run", calls.dt_run, self._decoder, 0, 2 * num_layers, tables)

    def _open(self, threads: int, sizes: DecoderSizes) -> Any:
        context = self._contexts[threads]
        calls = context.calls
        return context.open(calls.dt_decoder_open, calls.dt_decoder_close, byref(sizes))


def _contexts(form: CpuForm, threads: Sequence[int]) -> dict[int, CpuContext]:
    library = CpuLibrary()
    return {count: CpuContext(library, path=form.path, threads=count) for count in threads}


class _RandomWeights:
    """A decoder's weights in one arena: random bytes, scales that keep activations finite."""

    def __init__(self, spec: ModelSpec, group: int) -> None:
        decoder = spec.decoder
        self.spec = spec
        self._group = group
        self._random = np.random.default_rng(0)
        self._records = RecordFormat(
            dtype="int4" if group else "int8",
            group=group or None,
            width=decoder.width,
            ffn_width=decoder.expert_ffn_width,
        )
        step = group or 16
        dense_width = -(-decoder.dense_ffn_width // step) * step
        self._dense = replace(self._records, ffn_width=dense_width)
        self._kept: list[Any] = []
        self.record_bytes = self._records.record_bytes
        self.tables = np.zeros((decoder.num_layers, decoder.num_experts), np.uint64)
        for layer in decoder.moe_layers:
            self.tables[layer] = self._experts(self._records, decoder.num_experts)
        self.norm = np.ones(max(decoder.width, decoder.latent_dim), np.float32)  # all norms
        self.table = self._matrix(spec.vocabulary.size, decoder.width)
        self.layers = (Layer * decoder.num_layers)(*map(self._layer, range(decoder.num_layers)))

    def _layer(self, index: int) -> Layer:
        decoder = self.spec.decoder
        heads, is_dense = decoder.num_heads, index not in decoder.moe_layers
        count = 1 if is_dense else decoder.num_shared_experts
        form = self._dense if is_dense else self._records
        own = [Span(int(place), form.record_bytes) for place in self._experts(form, count)]
        own_mlps = (Span * count)(*own)
        router = huge_array(4 * decoder.num_experts * decoder.width).view(np.float32)
        np.random.default_rng(index).standard_normal(dtype=np.float32, out=router)
        self._kept += [own_mlps, router]
        qkv_rows = heads * decoder.nope_dim + (heads + 1) * decoder.rope_dim + decoder.latent_dim
        return Layer(
            record=record_of(form),
            own_record=record_of(form),
            qkv=self._matrix(qkv_rows, decoder.width),
            key_up=self._matrix(heads * decoder.latent_dim, decoder.nope_dim),
            value_up=self._matrix(heads * decoder.value_dim, decoder.latent_dim),
            out=self._matrix(decoder.width, heads * decoder.value_dim),
            attention_norm=span(self.norm),
            latent_norm=span(self.norm),
            mlp_norm=span(self.norm),
            router=Span() if is_dense else span(router),
            own_mlps=span_of(own_mlps),
        )

    def _matrix(self, rows: int, columns: int) -> Matrix:
        group = self._group
        weights = self._random_array(rows * columns // (2 if group else 1))
        scales = huge_array(rows * (columns // group * 2 if group else 4))
        _fill_scales(scales, group)
        self._kept += [weights, scales]
        return Matrix(span(weights), span(scales), rows, columns, group)

    def _experts(self, form: RecordFormat, count: int) -> NDArray[np.uint64]:
        """Return the addresses (count,) of consecutive records."""
        arena = self._random_array(count * form.record_bytes)
        for record in arena.reshape(count, -1):
            for name in ("gate_up_scales", "down_scales"):
                section = form.sections[name]
                _fill_scales(record[section.offset : section.end], self._group)
        self._kept.append(arena)
        return arena.ctypes.data + np.arange(count, dtype=np.uint64) * form.record_bytes

    def _random_array(self, num_bytes: int) -> NDArray[np.uint8]:
        array = huge_array(num_bytes)
        # Rows differ: with equal rows all tokens would come to choose the same experts.
        for start in range(0, num_bytes, _PIECE_BYTES):
            part = array[start : start + _PIECE_BYTES]
            part[:] = np.frombuffer(self._random.bytes(len(part)), np.uint8)
        return array


def _fill_scales(place: NDArray[np.uint8], group: int) -> None:
    place.view(np.float16 if group else np.float32)[:] = 0.004 if group else 0.0003
