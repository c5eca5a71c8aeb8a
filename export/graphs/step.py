"""`step.onnx`: the whole decoder as one graph, for engines that run a whole step at once.

    x (B, T, C), positions (T), caches -> hidden (B, T, C), new cache rows, what was routed

Attention is absorbed as in decoder.py, with the latent and the rotary key in tensors of
their own, which spares an engine the slice of a joint cache. The graph only reads the cache, S rows
of which the first `positions[0]` count, and gives the new rows of all layers out as two stacked
tensors: one strided copy puts them in place. So S may be a bucket or the whole capacity (one CUDA
graph for all steps), and no operator newer than opset 18 is needed but for int4: TensorRT 10.3
knows them all. Rows that do not count must still be finite.

An engine wants S fixed in a profile: of a free one TensorRT-RTX 1.7.1 pads and copies the cache in
every step. It also stores constants once for each profile; dense weights that are `given` lie in
one buffer for all profiles and engines.

The routed experts of a layer are one `DtMoE` node, their slot table and arena inputs (moe_node.py).

Residuals, norms, the router and softmax are float32 in every precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.checkpoint.mla import absorbed_projections, folded_projections
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.export.graphs.builder import FLOAT, INT32, Array, Graph, Precision
from deeptalk_edge.export.graphs.decoder import gate_up_weights
from deeptalk_edge.export.graphs.layers import (
    Dense,
    choose_experts,
    int8_gemv,
    linear,
    silu_times_up,
)
from deeptalk_edge.export.graphs.moe_node import moe_node

_END = np.iinfo(np.int64).max
_UNSEEN = -1e30  # infinity would be NaN in an engine that subtracts it from itself


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """Which step to write."""

    records: RecordFormat
    """How the routed experts lie in the arenas."""

    layer_records: Mapping[int, RecordFormat] = field(default_factory=dict)
    """The same of layers whose experts have another form."""

    precision: Precision = "float16"
    """Of products and the cache."""

    dense: Dense = "float"
    """How the dense weights are held."""

    num_items: int = 1
    """B: 2 where an answer is decoded batch-parallel. A step with T open leaves B open as well: a
    prompt has one item."""

    num_rows: int | None = 1
    """T: 1 to decode, None leaves it open for a prefill."""

    context_rows: int = 4096
    """Positions run up to here."""

    @property
    def has_open_items(self) -> bool:
        """B is free: 1 in a prompt, `num_items` in a step."""
        return self.num_rows is None and self.num_items > 1


def export_step(
    checkpoint: Checkpoint, directory: Path, settings: StepSettings, *, name: str = "step"
) -> None:
    """Write `<name>.onnx` and its weights, one layer in memory at a time.

    Raises ArtifactError if a weight is beyond the precision.
    """
    spec = checkpoint.spec.decoder
    with Graph(directory, name, precision=settings.precision) as graph:
        step = _Step(graph, checkpoint, settings)
        x = step.begin()
        for layer in range(spec.num_layers):
            x = step.layer(x, layer)
            graph.rename(x, f"layer_{layer}")  # where step_pieces.py cuts
        graph.output(step.norm(x, "model.norm"), "hidden", step.shape)
        step.give_out_caches_and_routing()


class _Step:
    """Writes the layers in order; values are (B, T, ...) unless said otherwise."""

    def __init__(self, graph: Graph, checkpoint: Checkpoint, settings: StepSettings) -> None:
        self._graph = graph
        self._checkpoint = checkpoint
        self._settings = settings
        self._spec = spec = checkpoint.spec.decoder
        self._items: int | str = "B" if settings.has_open_items else settings.num_items
        self._rows: int | str = "T" if settings.num_rows is None else settings.num_rows
        self.shape = (self._items, self._rows, spec.width)
        self._new_latents: list[str] = []
        self._new_ropes: list[str] = []
        self._expert_ids: list[str] = []
        self._missing: list[str] = []
        self._num_items = ""
        self._positions = graph.input("positions", INT32, (self._rows,))
        self._cos, self._sin = (self._turns(of) for of in (np.cos, np.sin))
        self._causal = self._make_causal()
        self._past = ""

    def begin(self) -> str:
        """Declare the input x."""
        x = self._graph.input("x", FLOAT, self.shape)
        if isinstance(self._items, str):
            self._num_items = self._graph.op("Shape", x, start=0, end=1)
        return x

    def layer(self, x: str, layer: int) -> str:
        """Attention, then a dense MLP or the experts, each after its norm."""
        graph, name = self._graph, f"model.layers.{layer}"
        x = graph.op("Add", x, self._attend(x, layer))
        exact = self.norm(x, f"{name}.post_attention_layernorm")
        normed = graph.half(exact)
        if layer not in self._spec.moe_layers:
            return graph.op("Add", x, self._mlp(normed, f"{name}.mlp"))
        if self._spec.num_shared_experts:
            x = graph.op("Add", x, self._mlp(normed, f"{name}.mlp.shared_experts"))
        return graph.op("Add", x, self._routed(exact, normed, layer))

    def norm(self, value: str, name: str) -> str:
        """RMSNorm of a float32 value, spelt out: older parsers lack RMSNormalization."""
        graph = self._graph
        weight = graph.weight(
            f"{name}.weight", self._checkpoint.tensor(f"{name}.weight"), precision="float32"
        )
        square = graph.op("ReduceMean", graph.op("Mul", value, value), graph.ints(-1))
        root = graph.op("Sqrt", graph.op("Add", square, graph.scalar(self._spec.eps_of(name))))
        return graph.op("Mul", graph.op("Div", value, root), weight)

    def give_out_caches_and_routing(self) -> None:
        """The stacked outputs, of all layers and of all MoE layers."""
        graph, spec = self._graph, self._spec
        for values, name, width in (
            (self._new_latents, "new_latents", spec.latent_dim),
            (self._new_ropes, "new_ropes", spec.rope_dim),
        ):
            shape = (spec.num_layers, self._items, self._rows, width)
            graph.output(self._stack(values), name, shape, data_type=self._graph.float_type)
        shape = (len(spec.moe_layers), self._items, self._rows, spec.top_k)
        graph.output(self._stack(self._expert_ids), "expert_ids", shape, data_type=INT32)
        missing = graph.op("Concat", *self._missing, axis=0)
        graph.output(missing, "missing", (len(spec.moe_layers),), data_type=INT32)

    def _attend(self, x: str, layer: int) -> str:
        """Attention of norm(x) over the cache and the rows themselves, in float32."""
        graph, spec = self._graph, self._spec
        heads, name = spec.num_heads, f"model.layers.{layer}.self_attn"
        normed = self.norm(x, f"model.layers.{layer}.input_layernorm")
        projections = folded_projections(self._checkpoint, name, query_scale=spec.softmax_scale)
        both = self._linear(graph.half(normed), f"{name}.qkv", projections)
        nope, ropes, latent = graph.split(
            both, [heads * spec.nope_dim, (heads + 1) * spec.rope_dim, spec.latent_dim]
        )
        latent = graph.half(self.norm(graph.exact(latent), f"{name}.kv_a_layernorm"))
        query_rope, key_rope = graph.split(self._rotate(ropes), [heads, 1], axis=2)
        key_rope = graph.op("Squeeze", key_rope, graph.ints(2))
        self._new_latents.append(latent)
        self._new_ropes.append(key_rope)
        key_up, value_up = absorbed_projections(self._checkpoint, name)
        query = self._per_head(nope, f"{name}.key_up", key_up)
        query = self._by_item(query, -1, spec.latent_dim)
        query_rope = self._by_item(query_rope, -1, spec.rope_dim)
        mixed = self._mix(query, query_rope, latent, key_rope, layer)
        values = self._per_head(mixed, f"{name}.value_up", value_up)
        values = self._by_item(values, -1, heads * spec.value_dim)
        weight = self._checkpoint.tensor(f"{name}.o_proj.weight")
        return graph.exact(self._linear(values, f"{name}.o_proj", weight))

    def _mix(self, query: str, query_rope: str, latent: str, key_rope: str, layer: int) -> str:
        """Queries (B, T * H, R) and (B, T * H, D) over S cached and T new rows: (B, T * H, R)."""
        graph, spec = self._graph, self._spec
        past_latent, past_rope = (
            graph.input(f"{name}_{layer}", self._graph.float_type, (self._items, "S", width))
            for name, width in (("latent", spec.latent_dim), ("rope", spec.rope_dim))
        )
        self._past = self._past or self._make_past(past_latent)

        def scores(latent: str, rope: str, mask: str) -> str:
            plain, turned = (
                graph.exact(
                    graph.op("MatMul", queries, graph.op("Transpose", keys, perm=[0, 2, 1]))
                )
                for queries, keys in ((query, latent), (query_rope, rope))
            )
            return graph.op("Add", graph.op("Add", plain, turned), mask)

        past = scores(past_latent, past_rope, self._past)
        new = scores(latent, key_rope, self._causal)
        shares = graph.half(graph.op("Softmax", graph.op("Concat", past, new, axis=-1), axis=-1))
        past_size = graph.op("Shape", past_latent, start=1, end=2)
        past_shares, new_shares = (
            graph.op("Slice", shares, begin, end, graph.ints(2))
            for begin, end in ((graph.ints(0), past_size), (past_size, graph.ints(_END)))
        )
        return graph.op(
            "Add",
            graph.op("MatMul", past_shares, past_latent),
            graph.op("MatMul", new_shares, latent),
        )

    def _routed(self, exact: str, normed: str, layer: int) -> str:
        """The weighted sum of the experts of each token, float32."""
        graph, spec = self._graph, self._spec
        name = f"model.layers.{layer}.mlp.gate"
        gate = self._checkpoint.tensor(f"{name}.weight").T
        logits = graph.op("MatMul", exact, graph.weight(name, gate, precision="float32"))
        weights, ids = choose_experts(graph, logits, spec)
        ids = graph.op("Cast", ids, to=INT32)
        routed, missing = moe_node(
            graph,
            normed,
            ids,
            weights,
            layer=layer,
            shape=self.shape,
            spec=spec,
            records=self._settings.layer_records.get(layer, self._settings.records),
        )
        self._expert_ids.append(ids)
        self._missing.append(missing)
        return graph.exact(routed)

    def _mlp(self, normed: str, name: str) -> str:
        gate_up = gate_up_weights(self._checkpoint, name)
        down = self._checkpoint.tensor(f"{name}.down_proj.weight")
        both = self._linear(normed, f"{name}.gate_up", gate_up)
        activated = silu_times_up(self._graph, both, len(gate_up) // 2)
        return self._graph.exact(self._linear(activated, f"{name}.down", down))

    def _linear(self, value: str, name: str, weight: Array) -> str:
        if self._settings.dense == "int8" and self._settings.num_rows == 1:
            return int8_gemv(self._graph, value, name, weight)
        return linear(self._graph, value, name, weight, self._settings.dense)

    def _rotate(self, ropes: str) -> str:
        """Turn (B, T, (H + 1) * D), halves apart, to (B, T, H + 1, D); computed in float32."""
        graph, half = self._graph, self._spec.rope_dim // 2
        heads = self._spec.num_heads + 1  # the last is the key's
        pairs = self._by_item(graph.exact(ropes), -1, heads, 2 * half)
        left, right = graph.split(pairs, [half, half])
        turned = [
            graph.op(
                "Sub" if other is right else "Add",
                graph.op("Mul", same, self._cos),
                graph.op("Mul", other, self._sin),
            )
            for same, other in ((left, right), (right, left))
        ]
        return graph.half(graph.op("Concat", *turned, axis=-1))

    def _by_item(self, value: str, *sizes: int) -> str:
        """A value as (B, *sizes)."""
        graph = self._graph
        if isinstance(self._items, int):
            return graph.reshape(value, self._items, *sizes)
        shape = graph.op("Concat", self._num_items, graph.ints(*sizes), axis=0)
        return graph.op("Reshape", value, shape)

    def _per_head(self, value: str, name: str, weight: Array) -> str:
        """Each head's matrix (H, width, D) on its own part of (.., H * width): (B * T, H, D)."""
        graph = self._graph
        by_row = graph.reshape(value, -1, *weight.shape[:2])
        by_head = graph.op("Transpose", by_row, perm=[1, 0, 2])
        matrix = graph.weight(name, weight)
        return graph.op("Transpose", graph.op("MatMul", by_head, matrix), perm=[1, 0, 2])

    def _turns(self, of: np.ufunc) -> str:
        """Cosines or sines of the rows, (T, 1, D / 2), from a table of all positions."""
        graph, spec = self._graph, self._spec
        positions = np.arange(self._settings.context_rows, dtype=np.float32)
        angles = positions[:, None] * np.array(spec.rope_frequencies(), np.float32)
        table = of(angles) * np.float32(spec.rope_amplitude)
        table_name = graph.weight(f"rotary.{of.__name__}", table, precision="float32")
        rows = graph.op("Gather", table_name, self._positions, axis=0)
        return graph.op("Unsqueeze", rows, graph.ints(1))

    def _make_causal(self) -> str:
        """(T * H, T): 0 where a row may look, else far below every score."""
        graph = self._graph
        column = graph.op("Unsqueeze", self._positions, graph.ints(1))
        mask = self._masked(graph.op("Less", column, self._positions))
        by_head = graph.op(
            "Expand",
            graph.op("Unsqueeze", mask, graph.ints(1)),
            graph.ints(1, self._spec.num_heads, 1),
        )
        return graph.op("Flatten", by_head, axis=2)

    def _make_past(self, cache: str) -> str:
        """(S): 0 for the rows that count."""
        graph = self._graph
        zero, one = (graph.constant(np.array(i, np.int32)) for i in (0, 1))
        size = graph.op("Cast", graph.op("Shape", cache, start=1, end=2), to=INT32)
        rows = graph.op("Range", zero, graph.op("Squeeze", size), one)
        first = graph.op("Gather", self._positions, graph.ints(0), axis=0)
        return self._masked(graph.op("GreaterOrEqual", rows, first))

    def _masked(self, hidden: str) -> str:
        graph = self._graph
        return graph.op("Where", hidden, graph.scalar(_UNSEEN), graph.scalar(0.0))

    def _stack(self, values: list[str]) -> str:
        graph = self._graph
        stacked = [graph.op("Unsqueeze", value, graph.ints(0)) for value in values]
        return graph.op("Concat", *stacked, axis=0)
