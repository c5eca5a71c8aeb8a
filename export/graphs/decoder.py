"""The decoder's graphs: embed, the segments cut at the routers, one expert, and the head.

Attention is absorbed. With kv_b moved into the query and after the mixing, every head reads the
cached latents as they are:

    scores = [q_nope W_k | q_rope] . [latent | k_rope]
    values = (softmax(scores) [latent | k_rope]) [W_v | 0]

The cache is never copied: past rows and new rows are scored apart and only the scores are joined.
The zeros beside W_v take the rotary key's place, so the cache need not be sliced either.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deeptalk_edge.checkpoint.mla import absorbed_projections, folded_projections
from deeptalk_edge.checkpoint.reader import EMBEDDING, HEAD, Checkpoint
from deeptalk_edge.export.graphs.builder import (
    BOOL,
    FLOAT,
    INT64,
    Array,
    Graph,
    Precision,
    WeightFile,
    in_precision,
)
from deeptalk_edge.export.graphs.layers import choose_experts, linear, silu_times_up
from deeptalk_edge.model.spec import DecoderSpec, ModelSpec

EMBEDDING_FILE = "embedding.bin"


def head_file(spec: ModelSpec) -> str:
    """The file of the head's table."""
    return EMBEDDING_FILE if spec.tied_head else "head.bin"


def _tables(spec: ModelSpec) -> dict[str, str]:
    """The tensor in each file of a table."""
    return {head_file(spec): HEAD, EMBEDDING_FILE: EMBEDDING}  # a tied head is no tensor


def export_embed_and_head(checkpoint: Checkpoint, directory: Path) -> None:
    """Write embed.onnx and head.onnx, over one embedding.bin if the head is tied."""
    spec, tables, stored = checkpoint.spec, _tables(checkpoint.spec), {}
    for file, tensor in tables.items():
        with WeightFile(directory / file) as weights:
            stored[file] = weights.append(checkpoint.tensor(tensor))
    for name, write, file in (
        ("embed", _write_embed, EMBEDDING_FILE),
        ("head", _write_head, head_file(spec)),
    ):
        with Graph(directory, name) as graph:
            write(graph, spec, graph.stored(tables[file], stored[file]))


def export_engine_embed_and_head(
    checkpoint: Checkpoint, directory: Path, *, precision: Precision
) -> None:
    """Write both with the table as their input `table` (V, C): two engines, one buffer if the head
    is tied.

    embedding.bin is what goes into it, row-major, in `precision`; head.bin for a separate head.

    Raises ArtifactError if a value is beyond that.
    """
    spec = checkpoint.spec
    for file, tensor in _tables(spec).items():
        with WeightFile(directory / file) as weights:
            weights.append(in_precision(tensor, checkpoint.tensor(tensor), precision))
    shape = (spec.vocabulary.size, spec.decoder.width)
    for name, write in (("embed", _write_embed), ("head", _write_head)):
        with Graph(directory, name, precision=precision) as graph:
            write(graph, spec, graph.input("table", graph.float_type, shape))


def _write_embed(graph: Graph, spec: ModelSpec, table: str) -> None:
    num_codebooks, width = spec.vocabulary.num_codebooks, spec.decoder.width
    rows = graph.input("rows", INT64, ("B", "T", num_codebooks + 1))
    features = graph.input("features", FLOAT, ("T", width))
    audio_mask = graph.input("audio_mask", BOOL, ("T",))
    columns = graph.exact(graph.op("Gather", table, rows, axis=0))
    codec, text = graph.split(columns, [num_codebooks, 1], axis=2)
    codec = graph.op("ReduceSum", codec, graph.ints(2), keepdims=0)
    heard = graph.op("Mul", features, graph.scalar(num_codebooks))
    mask = graph.op("Unsqueeze", audio_mask, graph.ints(1))
    codec = graph.op("Where", mask, heard, codec)
    total = graph.op("Add", codec, graph.op("Squeeze", text, graph.ints(2)))
    mean = graph.op("Div", total, graph.scalar(num_codebooks + 1))
    graph.output(mean, "x", ("B", "T", width))


def _write_head(graph: Graph, spec: ModelSpec, table: str) -> None:
    vocabulary = spec.vocabulary
    blocks = (vocabulary.num_codebooks, vocabulary.codebook_block)
    hidden = graph.input("hidden", FLOAT, ("B", spec.decoder.width))
    logits = graph.exact(graph.op("Gemm", graph.half(hidden), table, transB=1))
    text, codes = graph.split(logits, [vocabulary.text_size, blocks[0] * blocks[1]])
    graph.output(text, "text_logits", ("B", vocabulary.text_size))
    graph.output(graph.reshape(codes, -1, *blocks), "code_logits", ("B", *blocks))


def export_expert(spec: DecoderSpec, directory: Path) -> None:
    """Write expert.onnx: one routed expert, its weights as inputs."""
    width, ffn_width = spec.width, spec.expert_ffn_width
    with Graph(directory, "expert") as graph:
        x = graph.input("x", FLOAT, ("N", width))
        gate_up = graph.input("gate_up", FLOAT, (2 * ffn_width, width))
        down = graph.input("down", FLOAT, (width, ffn_width))
        both = graph.op("Gemm", x, gate_up, transB=1)
        activated = silu_times_up(graph, both, ffn_width)
        graph.output(graph.op("Gemm", activated, down, transB=1), "y", ("N", width))


def export_segments(checkpoint: Checkpoint, directory: Path) -> list[str]:
    """Write segment_00.onnx and so on; returns their file names."""
    spec = checkpoint.spec.decoder
    names = [f"segment_{i:02d}" for i in range(len(spec.moe_layers) + 1)]
    for i, name in enumerate(names):
        with Graph(directory, name) as graph:
            segment = _Segment(graph, checkpoint)
            x = segment.take_x() if i == 0 else segment.take_routed()
            if i == len(spec.moe_layers):
                segment.give_hidden(x)
                continue
            if i == 0:
                for layer in range(spec.num_dense_layers):
                    x = segment.dense_layer(x, layer)
            segment.route(x, spec.moe_layers[i])
    return [f"{name}.onnx" for name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What all attention of one segment shares: it follows from the shapes alone."""

    cos: str
    """(B, T, rope_dim / 2), as is `sin`."""
    sin: str
    causal: str
    """(T * H, T): 0 where a row may look, else -inf."""
    past: str
    """(1 + P,): 0, but -inf for the null row."""
    past_and_new: str
    """[1 + P, T]."""
    per_item: str
    """[B, -1, cache_width]."""
    per_row: str
    """[B, -1, H * value_dim]."""


class _Segment:
    """Writes one segment; values are (B, T, ...) unless said otherwise."""

    def __init__(self, graph: Graph, checkpoint: Checkpoint) -> None:
        self._graph = graph
        self._checkpoint = checkpoint
        self._spec = checkpoint.spec.decoder
        self._shape = ("B", "T", self._spec.width)
        self._rows: _Rows | None = None

    def take_x(self) -> str:
        return self._graph.input("x", FLOAT, self._shape)

    def take_routed(self) -> str:
        """The output of the previous segment, its experts included."""
        residual = self._graph.input("carried", FLOAT, self._shape)
        routed = self._graph.input("routed", FLOAT, self._shape)
        return self._graph.op("Add", residual, routed)

    def give_hidden(self, x: str) -> None:
        self._graph.output(self._norm(x, "model.norm"), "hidden", self._shape)

    def dense_layer(self, x: str, layer: int) -> str:
        name = f"model.layers.{layer}"
        x = self._attend(x, layer)
        return self._add_mlp(x, self._norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")

    def route(self, x: str, layer: int) -> None:
        """A MoE layer up to its experts: attention, norm, router, shared experts, all given out."""
        graph, spec = self._graph, self._spec
        name = f"model.layers.{layer}"
        x = self._attend(x, layer)
        normed = self._norm(x, f"{name}.post_attention_layernorm")
        gate = linear(graph, normed, f"{name}.mlp.gate", self._tensor(f"{name}.mlp.gate.weight"))
        weights, ids = choose_experts(graph, gate, spec)
        if spec.num_shared_experts:
            x = self._add_mlp(x, normed, f"{name}.mlp.shared_experts")
        graph.output(x, "residual", self._shape)
        graph.output(normed, "normed", self._shape)
        graph.output(ids, "expert_ids", ("B", "T", spec.top_k), data_type=INT64)
        graph.output(weights, "expert_weights", ("B", "T", spec.top_k))

    def _attend(self, x: str, layer: int) -> str:
        """x + attention(norm(x)), over the cache and the rows themselves."""
        graph, spec = self._graph, self._spec
        heads, name = spec.num_heads, f"model.layers.{layer}.self_attn"
        cache = graph.input(f"cache_{layer}", FLOAT, ("1+P", "B", spec.cache_width))
        if self._rows is None:
            self._rows = self._make_rows(x, cache)
        rows = self._rows
        normed = self._norm(x, f"model.layers.{layer}.input_layernorm")
        projections = folded_projections(self._checkpoint, name, query_scale=spec.softmax_scale)
        nope, ropes, latent = graph.split(
            linear(graph, normed, f"{name}.qkv", projections),
            [heads * spec.nope_dim, (heads + 1) * spec.rope_dim, spec.latent_dim],
        )
        ropes = graph.op("RotaryEmbedding", ropes, rows.cos, rows.sin, num_heads=heads + 1)
        query_rope, key_rope = graph.split(ropes, [heads * spec.rope_dim, spec.rope_dim])
        latent = self._norm(latent, f"{name}.kv_a_layernorm")
        new = graph.op("Concat", latent, key_rope, axis=-1)
        graph.output(
            graph.op("Transpose", new, perm=[1, 0, 2]),
            f"new_{layer}",
            ("T", "B", spec.cache_width),
        )
        key_up, value_up = absorbed_projections(self._checkpoint, name)
        value_up = np.pad(value_up, ((0, 0), (0, spec.rope_dim), (0, 0)))
        query = self._per_head(nope, spec.nope_dim, graph.weight(f"{name}.key_up", key_up))
        query_rope = graph.reshape(query_rope, -1, heads, spec.rope_dim)
        query = graph.op("Concat", query, query_rope, axis=-1)
        query = graph.op("Reshape", query, rows.per_item)
        mixed = self._mix(query, cache, new, rows)
        values = self._per_head(mixed, spec.cache_width, graph.weight(f"{name}.value_up", value_up))
        values = graph.op("Reshape", values, rows.per_row)
        out = linear(graph, values, f"{name}.o_proj", self._tensor(f"{name}.o_proj.weight"))
        return graph.op("Add", x, out)

    def _mix(self, query: str, cache: str, new: str, rows: _Rows) -> str:
        """Queries (B, T * H, W) against the cache and T new rows: mixed rows (B, T * H, W)."""
        graph = self._graph
        # ORT fuses both transposes into its MatMul: the cache is read where it lies.
        past_keys = graph.op("Transpose", cache, perm=[1, 2, 0])
        past_values = graph.op("Transpose", cache, perm=[1, 0, 2])
        new_keys = graph.op("Transpose", new, perm=[0, 2, 1])
        past_scores = graph.op("Add", graph.op("MatMul", query, past_keys), rows.past)
        new_scores = graph.op("Add", graph.op("MatMul", query, new_keys), rows.causal)
        scores = graph.op("Concat", past_scores, new_scores, axis=-1)
        shares = graph.op("Softmax", scores, axis=-1)
        past_shares, new_shares = graph.ops(
            "Split", shares, rows.past_and_new, num_outputs=2, axis=-1
        )
        return graph.op(
            "Add",
            graph.op("MatMul", past_shares, past_values),
            graph.op("MatMul", new_shares, new),
        )

    def _per_head(self, value: str, width: int, weight: str) -> str:
        """Each head's matrix (H, width, D) on its own part of a value (..., H * width).

        Returns (B * T, H, D).
        """
        graph = self._graph
        by_row = graph.reshape(value, -1, self._spec.num_heads, width)
        by_head = graph.op("Transpose", by_row, perm=[1, 0, 2])
        return graph.op("Transpose", graph.op("MatMul", by_head, weight), perm=[1, 0, 2])

    def _make_rows(self, x: str, cache: str) -> _Rows:
        graph, spec = self._graph, self._spec
        num_items = graph.op("Shape", x, start=0, end=1)
        num_rows = graph.op("Shape", x, start=1, end=2)
        # The null row keeps every dimension above 0: ONNX Runtime 1.23 divides by the size of an
        # empty product. It is the caller's zeros, and its share of any softmax is 0.
        num_cached = graph.op("Shape", cache, start=0, end=1)
        zero, one = (graph.constant(np.array(i, np.int64)) for i in (0, 1))
        num_past = graph.op("Sub", num_cached, one)
        cached = graph.op("Range", zero, graph.op("Squeeze", num_cached), one)
        is_null = graph.op("Equal", cached, zero)
        rows = graph.op("Range", zero, graph.op("Squeeze", num_rows), one)
        column = graph.op("Unsqueeze", rows, graph.ints(1))
        positions = graph.op("Cast", graph.op("Add", column, num_past), to=FLOAT)
        frequencies = graph.constant(np.array(spec.rope_frequencies(), np.float32))
        items = graph.op("Concat", num_items, graph.ints(1, 1), axis=0)
        angles = graph.op("Expand", graph.op("Mul", positions, frequencies), items)
        cos, sin = graph.op("Cos", angles), graph.op("Sin", angles)
        if spec.rope_amplitude != 1.0:
            amplitude = graph.scalar(spec.rope_amplitude)
            cos, sin = graph.op("Mul", cos, amplitude), graph.op("Mul", sin, amplitude)
        return _Rows(
            cos=cos,
            sin=sin,
            causal=self._causal(rows, column),
            past=graph.op("Where", is_null, graph.scalar(-np.inf), graph.scalar(0.0)),
            past_and_new=graph.op("Concat", num_cached, num_rows, axis=0),
            per_item=graph.op("Concat", num_items, graph.ints(-1, spec.cache_width), axis=0),
            per_row=graph.op(
                "Concat", num_items, graph.ints(-1, spec.num_heads * spec.value_dim), axis=0
            ),
        )

    def _causal(self, rows: str, column: str) -> str:
        graph = self._graph
        later = graph.op("Less", column, rows)
        mask = graph.op("Where", later, graph.scalar(-np.inf), graph.scalar(0.0))
        by_head = graph.op(
            "Expand",
            graph.op("Unsqueeze", mask, graph.ints(1)),
            graph.ints(1, self._spec.num_heads, 1),
        )
        return graph.op("Flatten", by_head, axis=2)

    def _add_mlp(self, x: str, normed: str, name: str) -> str:
        gate_up = gate_up_weights(self._checkpoint, name)
        down = self._tensor(f"{name}.down_proj.weight")
        both = linear(self._graph, normed, f"{name}.gate_up", gate_up)
        activated = silu_times_up(self._graph, both, len(gate_up) // 2)
        return self._graph.op("Add", x, linear(self._graph, activated, f"{name}.down", down))

    def _norm(self, value: str, name: str) -> str:
        weight = self._graph.weight(f"{name}.weight", self._tensor(f"{name}.weight"))
        return self._graph.op(
            "RMSNormalization", value, weight, axis=-1, epsilon=self._spec.eps_of(name)
        )

    def _tensor(self, name: str) -> Array:
        return self._checkpoint.tensor(name)


def gate_up_weights(checkpoint: Checkpoint, name: str) -> Array:
    """gate_proj over up_proj of an MLP, (2G, C)."""
    return np.concatenate(
        [checkpoint.tensor(f"{name}.{part}_proj.weight") for part in ("gate", "up")]
    )
