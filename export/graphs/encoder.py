"""`encoder.onnx`: log-mel to audio features, Whisper's encoder and projector.

for ONNX Runtime   any even number of mel frames up to the window's, and only the features that are
                   needed: after the last attention the other frames are dropped
for an engine      fixed: the whole window in, all of its features out

Source: arXiv 2212.04356 (Whisper); LUCY `multimodal_projector/builder.py: LinearProjector`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.export.graphs.builder import FLOAT, INT64, Array, Graph, Precision
from deeptalk_edge.export.graphs.layers import integer_linear, linear, silu_times_up

Products = Literal["float", "int8"]
"""How matrices are multiplied."""

_NORM_EPS = 1e-5  # torch's default, which Whisper keeps


def export_encoder(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    precision: Precision = "float32",
    products: Products = "float",
    is_fixed: bool = False,
) -> None:
    """Write encoder.onnx and its weights; log-mel, residuals and norms are float32 in any case.

    `is_fixed` is the form of an engine.

    Products in `int8` are for ONNX Runtime on a CPU: half the time for 2 to 5 % of error in the
    features.

    Raises ValueError if int8 is to go with float16.
    """
    if (precision, products) == ("float16", "int8"):
        raise ValueError("an encoder with int8 products is float32 elsewhere, not float16")
    encoder = checkpoint.spec.encoder
    frames, width = encoder.max_frames, checkpoint.spec.decoder.width
    with Graph(directory, "encoder", precision=precision) as graph:
        writer = _Encoder(graph, checkpoint, products)
        mel_frames = 2 * frames if is_fixed else "mel_frames"
        log_mel = graph.input("log_mel", FLOAT, (1, encoder.num_mel_bins, mel_frames))
        kept = None
        if not is_fixed:
            kept = graph.op("Unsqueeze", graph.input("num_frames", INT64, ()), graph.ints(0))
        hidden = writer.stem(log_mel, is_fixed=is_fixed)
        for i in range(encoder.num_layers):
            is_last = i == encoder.num_layers - 1
            hidden = writer.layer(hidden, f"layers.{i}", kept if is_last else None)
        features = writer.project(writer.norm(hidden, "layer_norm"))
        graph.output(graph.exact(features), "features", (frames if is_fixed else "frames", width))


class _Encoder:
    """Writes the encoder's parts; values are (F, W) but in the stem."""

    def __init__(self, graph: Graph, checkpoint: Checkpoint, products: Products) -> None:
        self._graph = graph
        self._product = linear if products == "float" else integer_linear
        self._checkpoint = checkpoint
        self._spec = checkpoint.spec.encoder

    def stem(self, log_mel: str, *, is_fixed: bool) -> str:
        """Two convolutions and the positions: (1, M, 2F) to (F, W)."""
        graph = self._graph
        waves = graph.op("Gelu", self._convolve(graph.half(log_mel), "conv1", stride=1))
        waves = graph.op("Gelu", self._convolve(waves, "conv2", stride=2))
        frames = graph.op("Transpose", graph.reshape(waves, self._spec.width, -1), perm=[1, 0])
        positions = self._exact_weight("embed_positions.weight")
        if not is_fixed:
            positions = self._first(positions, graph.op("Shape", frames, end=1))
        return graph.op("Add", graph.exact(frames), positions)

    def layer(self, hidden: str, name: str, kept: str | None = None) -> str:
        """(F, W) to (F, W), or to the first `kept` (1) frames."""
        graph = self._graph
        attended = self._attend(self.norm(hidden, f"{name}.self_attn_layer_norm"), name, kept)
        if kept:
            hidden = self._first(hidden, kept)
        hidden = graph.op("Add", hidden, graph.exact(attended))
        normed = self.norm(hidden, f"{name}.final_layer_norm")
        widened = graph.op("Gelu", self._linear(normed, f"{name}.fc1"))
        return graph.op("Add", hidden, graph.exact(self._linear(widened, f"{name}.fc2")))

    def norm(self, hidden: str, name: str) -> str:
        """LayerNorm of float32 frames, in the graph's precision."""
        normed = self._graph.op(
            "LayerNormalization",
            hidden,
            self._exact_weight(f"{name}.weight"),
            self._exact_weight(f"{name}.bias"),
            epsilon=_NORM_EPS,
        )
        return self._graph.half(normed)

    def project(self, frames: str) -> str:
        """proj(silu(fc_1 x) * fc_2 x)."""
        graph, name = self._graph, "model.audio_mm_projector"
        both = np.concatenate(
            [self._checkpoint.tensor(f"{name}.{part}.weight") for part in ("fc_1", "fc_2")]
        )
        down = self._checkpoint.tensor(f"{name}.proj.weight")
        gate_up = self._product(graph, frames, f"{name}.gate_up", both)
        activated = silu_times_up(graph, gate_up, len(down[0]))
        return self._product(graph, activated, f"{name}.down", down)

    def _attend(self, hidden: str, layer: str, kept: str | None) -> str:
        """Attention of all frames, or of the first `kept` (1), to all; the query weights include
        the scale."""
        graph, heads = self._graph, self._spec.num_heads
        name = f"{layer}.self_attn"
        head_width = self._spec.width // heads
        scale = np.float32(head_width**-0.5)
        weight = np.concatenate([self._tensor(f"{name}.{p}_proj.weight") for p in "qkv"])
        bias = np.concatenate(
            [
                self._tensor(f"{name}.q_proj.bias"),
                np.zeros(self._spec.width, np.float32),  # Whisper's keys have no bias
                self._tensor(f"{name}.v_proj.bias"),
            ]
        )
        weight[: self._spec.width] *= scale
        bias[: self._spec.width] *= scale
        both = self._product(graph, hidden, f"{name}.qkv", weight)
        both = graph.op("Add", both, graph.weight(f"{name}.qkv.bias", bias))
        parts = graph.split(both, [self._spec.width] * 3)
        if kept:
            parts[0] = self._first(parts[0], kept)
        query, key, value = (
            graph.op("Transpose", graph.reshape(part, -1, heads, head_width), perm=perm)
            for part, perm in zip(parts, ([1, 0, 2], [1, 2, 0], [1, 0, 2]), strict=True)
        )
        scores = graph.exact(graph.op("MatMul", query, key))
        shares = graph.half(graph.op("Softmax", scores, axis=-1))
        mixed = graph.op("Transpose", graph.op("MatMul", shares, value), perm=[1, 0, 2])
        return self._linear(graph.reshape(mixed, -1, self._spec.width), f"{name}.out_proj")

    def _first(self, frames: str, count: str) -> str:
        """The first `count` (1) of (F, W)."""
        return self._graph.op("Slice", frames, self._graph.ints(0), count, self._graph.ints(0))

    def _linear(self, hidden: str, name: str) -> str:
        product = self._product(self._graph, hidden, name, self._tensor(f"{name}.weight"))
        return self._graph.op("Add", product, self._weight(f"{name}.bias"))

    def _convolve(self, waves: str, name: str, *, stride: int) -> str:
        return self._graph.op(
            "Conv",
            waves,
            self._weight(f"{name}.weight"),
            self._weight(f"{name}.bias"),
            kernel_shape=[3],
            pads=[1, 1],
            strides=[stride],
        )

    def _weight(self, name: str) -> str:
        return self._graph.weight(name, self._tensor(name))

    def _exact_weight(self, name: str) -> str:
        return self._graph.weight(name, self._tensor(name), precision="float32")

    def _tensor(self, name: str) -> Array:
        return self._checkpoint.tensor(f"model.audio_encoder.{name}")
