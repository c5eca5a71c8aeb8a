"""The weights of a bundle for the native backend, in memory and described to its kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.manifest import NATIVE_INDEX, NATIVE_WEIGHTS
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.expert_record import RecordFormat
from deeptalk_edge.runtime.backends.huge_pages import huge_array, read_into
from deeptalk_edge.runtime.backends.native_library import (
    CACHE_KINDS,
    DecoderSizes,
    Layer,
    Matrix,
    Record,
)
from deeptalk_edge.schema import read_json
from deeptalk_edge.spec import ModelSpec

NATIVE_FORMAT = 1


def decoder_sizes(
    spec: ModelSpec,
    *,
    cache_kind: str,
    cache_rows: int,
    max_tokens: int,
    rope_frequencies: int,
    final_norm: int,
    table: Matrix,
) -> DecoderSizes:
    """A decoder's sizes as the library takes them; the caller keeps what the addresses name."""
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
    )


class NativeWeights:
    """native.bin in huge pages. What it hands out points into it: keep it as long."""

    def __init__(self, directory: Path, records: RecordFormat) -> None:
        """Read all of it.

        Raises ArtifactError if it is missing, damaged, of another format, or made for other expert
        records.
        """
        index = read_json(directory / NATIVE_INDEX)
        if index.get("format") != NATIVE_FORMAT:
            raise ArtifactError(
                f"{directory / NATIVE_INDEX}: format {index.get('format')!r}, this runtime reads "
                f"{NATIVE_FORMAT}; export the bundle again"
            )
        expected = {"dtype": records.dtype, "group": records.group}
        if index.get("experts") != expected:
            raise ArtifactError(
                f"{directory / NATIVE_INDEX}: made for experts {index.get('experts')}, the bundle "
                f"holds {expected}; export the bundle again"
            )
        self._arrays: Mapping[str, Mapping[str, int]] = index["arrays"]
        self._index, self._records = directory / NATIVE_INDEX, records
        path = directory / NATIVE_WEIGHTS
        self._bytes = huge_array(path.stat().st_size if path.is_file() else 0)
        read_into(path, 0, self._bytes)
        self._own_mlps: list[NDArray[np.uint64]] = []  # what layers point to
        self._frequencies = np.empty(0, np.float32)

    def sizes(
        self, spec: ModelSpec, *, cache_kind: str, cache_rows: int, max_tokens: int
    ) -> DecoderSizes:
        """The decoder's sizes as the library takes them."""
        self._frequencies = np.array(spec.decoder.rope_frequencies(), np.float32)
        return decoder_sizes(
            spec,
            cache_kind=cache_kind,
            cache_rows=cache_rows,
            max_tokens=max_tokens,
            rope_frequencies=self._frequencies.ctypes.data,
            final_norm=self._address("final_norm"),
            table=self._matrix("table"),
        )

    def layers(self, num_layers: int) -> Any:
        """An array of `Layer`."""
        return (Layer * num_layers)(*(self._layer(f"layers.{i}") for i in range(num_layers)))

    def _layer(self, name: str) -> Layer:
        mlps = [key for key in self._arrays if key.startswith(f"{name}.mlp.")]
        own = np.array([self._address(key) for key in mlps], np.uint64)
        self._own_mlps.append(own)
        ffn_width = self._entry(mlps[0])["ffn_width"] if mlps else self._records.ffn_width
        has_router = f"{name}.router" in self._arrays
        return Layer(
            record=record_of(self._records, ffn_width),
            qkv=self._matrix(f"{name}.qkv"),
            key_up=self._matrix(f"{name}.key_up"),
            value_up=self._matrix(f"{name}.value_up"),
            out=self._matrix(f"{name}.out"),
            attention_norm=self._address(f"{name}.input_layernorm"),
            latent_norm=self._address(f"{name}.self_attn.kv_a_layernorm"),
            mlp_norm=self._address(f"{name}.post_attention_layernorm"),
            router=self._address(f"{name}.router") if has_router else None,
            own_mlps=own.ctypes.data,
            num_own_mlps=len(own),
        )

    def _matrix(self, name: str) -> Matrix:
        entry = self._entry(name)
        scales = self._bytes.ctypes.data + entry["scales_offset"]
        return Matrix(self._address(name), scales, entry["rows"], entry["columns"], entry["group"])

    def _address(self, name: str) -> int:
        offset = self._entry(name)["offset"]
        if not 0 <= offset < len(self._bytes):
            raise ArtifactError(
                f"{self._index}: {name} at {offset} of {len(self._bytes)} bytes; export again"
            )
        return int(self._bytes.ctypes.data + offset)

    def _entry(self, name: str) -> Mapping[str, int]:
        if name not in self._arrays:
            raise ArtifactError(f"{self._index}: {name} is missing; export the bundle again")
        return self._arrays[name]


def record_of(form: RecordFormat, ffn_width: int | None = None) -> Record:
    """A record's places as the library takes them; `ffn_width` if it is not the routed experts'."""
    if ffn_width is not None:
        form = RecordFormat(
            dtype=form.dtype, group=form.group, width=form.width, ffn_width=ffn_width
        )
    sections = form.sections
    names = ("gate_up", "down", "gate_up_scales", "down_scales")
    offsets = (sections[name].offset for name in names)
    return Record(form.width, form.ffn_width, form.group or 0, *offsets)
