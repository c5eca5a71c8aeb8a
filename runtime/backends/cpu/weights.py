"""The weights of a bundle for the CPU backend, in memory and described to its kernels.

bundle/native_index.py gives the place of each array. The kernels get arrays of exactly that size,
cut out of the file's bytes, and check their shapes against the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.bundle.manifest import NATIVE_INDEX, NATIVE_WEIGHTS
from deeptalk_edge.bundle.native_index import MatrixPlace, own_mlp_form, read_native_index
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.runtime.backends.cpu.huge_pages import huge_array, read_into
from deeptalk_edge.runtime.backends.cpu.library import (
    CACHE_KINDS,
    DecoderSizes,
    Layer,
    Matrix,
    Record,
    Span,
    span,
    span_of,
)


def decoder_sizes(
    spec: ModelSpec,
    *,
    cache_kind: str,
    cache_rows: int,
    max_tokens: int,
    rope_frequencies: Span,
    final_norm: Span,
    table: Matrix,
    head: Matrix,
    layers: Any,
) -> DecoderSizes:
    """Return a decoder's sizes for the library; `layers` is an array of `Layer`. The caller keeps
    the spans' arrays alive.

    Raises ValueError for a size that the library's fields do not hold.
    """
    decoder = spec.decoder
    return DecoderSizes(
        width=decoder.width,
        num_layers=decoder.num_layers,
        heads=decoder.num_heads,
        nope=decoder.nope_dim,
        rope=decoder.rope_dim,
        value=decoder.value_dim,
        latent=decoder.latent_dim,
        num_experts=decoder.num_experts,
        top_k=decoder.top_k,
        normalise_top_k=decoder.normalise_top_k,
        vocabulary=spec.vocabulary.size,
        num_codebooks=spec.vocabulary.num_codebooks,
        cache_kind=CACHE_KINDS[cache_kind],
        max_tokens=max_tokens,
        norm_epsilon=decoder.norm_eps,
        softmax_scale=decoder.softmax_scale,
        rope_amplitude=decoder.rope_amplitude,
        routed_scale=decoder.routed_scale,
        cache_rows=cache_rows,
        rope_frequencies=rope_frequencies,
        final_norm=final_norm,
        table=table,
        head=head,
        layers=span_of(layers),
    )


class CpuWeights:
    """native.bin in huge pages. Its results point into it, so keep it as long as them."""

    def __init__(
        self,
        directory: Path,
        records: RecordFormat,
        spec: ModelSpec,
        record_of_layer: Callable[[int], RecordFormat] | None = None,
    ) -> None:
        """Read the whole file. `records` is the form of routed experts of layers that
        `record_of_layer` does not name.

        Raises ArtifactError if the file is missing, damaged, of another format, or made for another
        model or other expert records.
        """
        path = directory / NATIVE_WEIGHTS
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file; copy the bundle again")
        file_bytes = path.stat().st_size
        self._spec = spec
        self._record_of_layer = record_of_layer or (lambda layer: records)
        self._places, self._own = read_native_index(
            directory / NATIVE_INDEX, records, spec, file_bytes
        )
        self._bytes = huge_array(file_bytes)
        read_into(path, 0, self._bytes)
        self._frequencies = np.array(spec.decoder.rope_frequencies(), np.float32)
        self._own_mlps: list[Any] = []  # keeps alive what the layers point to
        num_layers = spec.decoder.num_layers
        self._layers = (Layer * num_layers)(*map(self._layer, range(num_layers)))

    def sizes(self, *, cache_kind: str, cache_rows: int, max_tokens: int) -> DecoderSizes:
        """The decoder's sizes for the library."""
        return decoder_sizes(
            self._spec,
            cache_kind=cache_kind,
            cache_rows=cache_rows,
            max_tokens=max_tokens,
            rope_frequencies=span(self._frequencies),
            final_norm=self._array("final_norm"),
            table=self._matrix("table"),
            head=self._matrix("table" if self._spec.tied_head else "head"),
            layers=self._layers,
        )

    def _layer(self, layer: int) -> Layer:
        name, decoder = f"layers.{layer}", self._spec.decoder
        routes = layer in decoder.moe_layers
        num_mlps = decoder.num_shared_experts if routes else 1
        mlps = (Span * num_mlps)(*(self._array(f"{name}.mlp.{i}") for i in range(num_mlps)))
        self._own_mlps.append(mlps)
        own = own_mlp_form(decoder, layer, self._own)
        return Layer(
            record=record_of(self._record_of_layer(layer) if routes else own),
            own_record=record_of(own),
            qkv=self._matrix(f"{name}.qkv"),
            key_up=self._matrix(f"{name}.key_up"),
            value_up=self._matrix(f"{name}.value_up"),
            out=self._matrix(f"{name}.out"),
            attention_norm=self._array(f"{name}.input_layernorm"),
            latent_norm=self._array(f"{name}.self_attn.kv_a_layernorm"),
            mlp_norm=self._array(f"{name}.post_attention_layernorm"),
            router=self._array(f"{name}.router") if routes else Span(),
            own_mlps=span_of(mlps),
        )

    def _matrix(self, name: str) -> Matrix:
        place = self._places[name]
        assert isinstance(place, MatrixPlace)
        weights, scales = self._arrays(name)
        return Matrix(weights, scales, place.rows, place.columns, place.group)

    def _array(self, name: str) -> Span:
        (array,) = self._arrays(name)
        return array

    def _arrays(self, name: str) -> list[Span]:
        extents = self._places[name].extents(self._own)
        return [span(self._bytes[offset : offset + size]) for _, offset, size in extents]


def record_of(form: RecordFormat) -> Record:
    """The offsets of a record's sections for the library."""
    sections = form.sections
    names = ("gate_up", "down", "gate_up_scales", "down_scales")
    offsets = (sections[name].offset for name in names)
    return Record(form.width, form.ffn_width, form.group or 0, *offsets)
