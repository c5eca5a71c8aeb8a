"""The decoder as a graph of the best stock operators in ONNX Runtime's CPU provider.

projections    MatMulNBits, int4 in blocks of 128, int8 products (accuracy level 4)
experts        QMoE, int4, int8 products; the shared experts are one MLP of MatMulNBits
attention      absorbed, plain products over a float32 cache that the caller owns: the fastest of
               the stock forms. The heads' matrices are float32, because no operator takes them in
               int4
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from deeptalk_edge.bench.cpu.sizes import Form
from deeptalk_edge.export.graphs.builder import FLOAT, INT64, IR_VERSION, OPSET, Nodes, WeightFile
from deeptalk_edge.model.spec import ModelSpec

BLOCK = 128
STOCK_FORM = Form(weight_bits=4 + 32 / BLOCK, cache_value_bytes=4, head_weight_bits=32)

_CONTRIB = "com.microsoft"
_UNSEEN = -1e30


def write_stock_graph(place: Path, spec: ModelSpec, cache_rows: int) -> None:
    """Write a graph with random weights.

    x (T, C), positions (T), cache_L (S, D) -> logits (1, V), row_L (T, D)
    """
    with WeightFile(place.with_suffix(".bin")) as weights:
        writer = _Writer(spec, weights, cache_rows)
        x = "x"
        for layer in range(spec.decoder.num_layers):
            x = writer.layer(x, layer)
        writer.head(x)
    inputs = [
        helper.make_tensor_value_info("x", FLOAT, ("T", spec.decoder.width)),
        helper.make_tensor_value_info("positions", INT64, ("T",)),
        *(
            helper.make_tensor_value_info(f"cache_{i}", FLOAT, ("S", spec.decoder.cache_width))
            for i in range(spec.decoder.num_layers)
        ),
    ]
    outputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in writer.outputs]
    graph = helper.make_graph(writer.nodes, "stock", inputs, outputs, writer.initialisers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_CONTRIB, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    place.write_bytes(model.SerializeToString())


class _Writer(Nodes):
    """Writes layer by layer; values are (T, ..), in attention (H, T, ..)."""

    def __init__(self, spec: ModelSpec, weights: WeightFile, cache_rows: int) -> None:
        super().__init__()
        self._spec, self._decoder, self._weights = spec, spec.decoder, weights
        self._random = np.random.default_rng(0)
        self.outputs = ["logits"]
        angles = np.arange(cache_rows, dtype=np.float32)[:, None] * np.array(
            self._decoder.rope_frequencies(), np.float32
        )
        self._cos, self._sin = self._stored(np.cos(angles)), self._stored(np.sin(angles))
        self._position_ids = self.op("Unsqueeze", "positions", self.ints(0))
        later = self.op("Less", self.op("Unsqueeze", "positions", self.ints(1)), "positions")
        self._causal = self.op("Where", later, self.scalar(_UNSEEN), self.scalar(0.0))

    def layer(self, x: str, layer: int) -> str:
        decoder = self._decoder
        x = self.op("Add", x, self._attend(self._norm(x, decoder.width), layer))
        normed = self._norm(x, decoder.width)
        if layer not in decoder.moe_layers:
            return self.op("Add", x, self._mlp(normed, decoder.dense_ffn_width))
        if decoder.num_shared_experts:
            x = self.op("Add", x, self._mlp(normed, decoder.shared_ffn_width))
        return self.op("Add", x, self._experts(normed))

    def head(self, x: str) -> None:
        """Return the logits of the last row."""
        last = self.op("Slice", x, self.ints(-1), self.ints(np.iinfo(np.int64).max), self.ints(0))
        normed = self._norm(last, self._decoder.width)
        logits = self._linear(normed, self._decoder.width, self._spec.vocabulary.size)
        self.nodes.append(helper.make_node("Identity", [logits], ["logits"]))

    def _attend(self, normed: str, layer: int) -> str:
        decoder = self._decoder
        heads, rope = decoder.num_heads, decoder.rope_dim
        sizes = [heads * decoder.nope_dim, heads * rope, decoder.latent_dim, rope]
        every = self._linear(normed, decoder.width, sum(sizes))
        nope, query_rope, latent, key_rope = self.split(every, sizes)
        latent = self._norm(latent, decoder.latent_dim)
        key_rope = self.op("Squeeze", self._rotated(key_rope, 1), self.ints(0))
        row = f"row_{layer}"
        self.nodes.append(helper.make_node("Concat", [latent, key_rope], [row], axis=-1))
        self.outputs.append(row)
        query = self.op(
            "MatMul",
            self._by_head(nope, decoder.nope_dim),
            self._floats(heads, decoder.nope_dim, decoder.latent_dim),
        )
        query = self.op("Concat", query, self._rotated(query_rope, heads), axis=-1)
        query = self.op("Mul", query, self.scalar(decoder.softmax_scale))
        mixed = self._mix(query, f"cache_{layer}", row)
        values = self.op(
            "MatMul", mixed, self._floats(heads, decoder.latent_dim, decoder.value_dim)
        )
        value_width = heads * decoder.value_dim
        rows = self.reshape(self.op("Transpose", values, perm=[1, 0, 2]), -1, value_width)
        return self._linear(rows, value_width, decoder.width)

    def _mix(self, query: str, cache: str, row: str) -> str:
        """Attend from queries (H, T, D) to the S cached and the T new rows: (H, T, R)."""
        decoder = self._decoder
        past, new = (
            self.op("MatMul", query, self.op("Transpose", rows, perm=[1, 0]))
            for rows in (cache, row)
        )
        new = self.op("Add", new, self._causal)
        shares = self.op("Softmax", self.op("Concat", past, new, axis=-1), axis=-1)
        size = self.op("Shape", cache, start=0, end=1)
        past_shares = self.op("Slice", shares, self.ints(0), size, self.ints(2))
        end = self.ints(np.iinfo(np.int64).max)
        new_shares = self.op("Slice", shares, size, end, self.ints(2))
        both = self.op(
            "Add", self.op("MatMul", past_shares, cache), self.op("MatMul", new_shares, row)
        )
        # Slicing the rope off here is cheaper than slicing the cache.
        return self.split(both, [decoder.latent_dim, decoder.rope_dim])[0]

    def _experts(self, normed: str) -> str:
        decoder = self._decoder
        count, width, ffn_width = decoder.num_experts, decoder.width, decoder.expert_ffn_width
        gate = self._stored(self._random.standard_normal((width, count), np.float32))
        up, up_scales = self._int4((count, 2 * ffn_width), width)
        down, down_scales = self._int4((count, width), ffn_width)
        return self.op(
            "QMoE",
            *(normed, self.op("MatMul", normed, gate)),
            *(up, up_scales, "", down, down_scales, ""),
            domain=_CONTRIB,
            k=decoder.top_k,
            block_size=BLOCK,
            expert_weight_bits=4,
            accuracy_level=4,
            activation_type="swiglu",
            activation_alpha=1.0,
            activation_beta=0.0,
            swiglu_fusion=1,
            normalize_routing_weights=int(decoder.normalises_weights),
        )

    def _mlp(self, normed: str, ffn_width: int) -> str:
        both = self._linear(normed, self._decoder.width, 2 * ffn_width)
        gate, up = self.split(both, [ffn_width, ffn_width])
        gate = self.op("Mul", gate, self.op("Sigmoid", gate))
        return self._linear(self.op("Mul", gate, up), ffn_width, self._decoder.width)

    def _linear(self, value: str, columns: int, rows: int) -> str:
        blocks, scales = self._int4((rows,), columns)
        return self.op(
            "MatMulNBits",
            *(value, blocks, scales),
            domain=_CONTRIB,
            K=columns,
            N=rows,
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,
        )

    def _int4(self, rows: tuple[int, ...], columns: int) -> tuple[str, str]:
        """Make random weights (rows, columns) and their scales."""
        num_blocks = -(-columns // BLOCK)
        # MatMulNBits takes separate blocks, QMoE whole rows.
        of_row = (num_blocks, BLOCK // 2) if len(rows) == 1 else (columns // 2,)
        shape = (*rows, *of_row)
        weights = np.frombuffer(self._random.bytes(int(np.prod(shape))), np.uint8).reshape(shape)
        scales = np.full((*rows, num_blocks), 0.004, np.float32)
        return self._stored(weights), self._stored(scales)

    def _floats(self, *shape: int) -> str:
        return self._stored(self._random.standard_normal(shape, np.float32) * np.float32(0.02))

    def _norm(self, value: str, width: int) -> str:
        ones = self._stored(np.ones(width, np.float32))
        return self.op(
            "SimplifiedLayerNormalization", value, ones, axis=-1, epsilon=self._decoder.norm_eps
        )

    def _rotated(self, value: str, heads: int) -> str:
        """Rotate (T, H * D) by position: (H, T, D)."""
        batch = self.op("Unsqueeze", self._by_head(value, self._decoder.rope_dim), self.ints(0))
        turned = self.op(
            "RotaryEmbedding",
            *(batch, self._position_ids, self._cos, self._sin),
            domain=_CONTRIB,
            interleaved=1,
        )
        return self.reshape(turned, heads, -1, self._decoder.rope_dim)

    def _by_head(self, value: str, width: int) -> str:
        """Reshape (T, H * D) to (H, T, D)."""
        return self.op("Transpose", self.reshape(value, 0, -1, width), perm=[1, 0, 2])

    def _stored(self, array: NDArray[np.float32] | NDArray[np.uint8]) -> str:
        name = f"weight_{len(self.initialisers)}"
        stored = self._weights.append(array)
        tensor = TensorProto(name=name, data_type=stored.data_type, dims=stored.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", stored.file_name),
            ("offset", str(stored.offset)),
            ("length", str(stored.num_bytes)),
        ):
            tensor.external_data.add(key=key, value=value)
        self.initialisers.append(tensor)
        return name
