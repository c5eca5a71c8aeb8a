"""What running a model moves and computes, from its sizes alone.

step      one row of each item through the decoder and the heads: every dense weight once, the
          experts of the items, the cached rows of each
prefill   the rows of a question at once; the matrices count, attention over them is left out (2 %
          of it at 280 rows of the official size). Our CPU kernels run the last layer's MLP on the
          last row alone, whose logits are asked for
encoder   its window; the products of matrices and of attention
codec     one frame of sound: products, weights, and activations, which are no products

A product of a weight and a value is two operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.bundle.precision import Precision
from deeptalk_edge.devices.plan.shapes import Shape, WeightShapes, weight_bytes
from deeptalk_edge.model.spec import CodecSpec, DecoderSpec, EncoderSpec, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecWork:
    """Of one frame of sound through SNAC's decoder."""

    operations: float
    weight_bytes: float
    """Read once a frame."""
    activations: float
    """Values that pass a Snake, x + sin(a x)^2 / a."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWork:
    """Bytes and operations; the official size's are in tests/devices/plan/test_work.py."""

    dense_bytes: int
    """Decoder without routed experts, read once a step."""
    head_bytes: int
    expert_bytes: int
    num_moe_layers: int
    num_experts: int
    """Of a layer."""
    top_k: int
    cache_row_bytes: int
    """A row of one item, all layers."""
    encoder_bytes: int
    row_operations: float
    """Of one row through the decoder, its experts included, the heads left out."""
    head_operations: float
    encoder: EncoderSpec
    encoder_row_weights: int
    codec: CodecWork
    unread_row_operations: float = 0.0
    """Of `row_operations`, what only the last row of a prefill takes."""

    @classmethod
    def of(
        cls,
        model: ModelSpec,
        codec: CodecSpec,
        precision: Precision,
        records: RecordFormat,
        *,
        keeps_last_row: bool = False,
    ) -> ModelWork:
        """Of a model that is stored in these precisions; with `keeps_last_row` a backend runs the
        last layer's MLP on the last row of a prefill alone, as our CPU kernels do."""
        shapes, decoder = WeightShapes.of(model, codec, with_noise=False), model.decoder
        sizes = shapes.bytes(precision)
        value_bytes = {"float32": 4, "int8": 1}.get(precision.kv_cache, 2)
        return cls(
            dense_bytes=sizes["decoder"],
            head_bytes=weight_bytes(shapes.head or shapes.embedding, precision.head),
            expert_bytes=records.record_bytes,
            num_moe_layers=len(decoder.moe_layers),
            num_experts=decoder.num_experts,
            top_k=decoder.top_k,
            cache_row_bytes=value_bytes * decoder.num_layers * decoder.cache_width,
            encoder_bytes=sizes["encoder"],
            row_operations=2.0 * (_weights(shapes.decoder) + _expert_weights(decoder)),
            head_operations=2.0 * prod((shapes.head or shapes.embedding)[0]),
            encoder=model.encoder,
            encoder_row_weights=_encoder_row_weights(model.encoder),
            codec=codec_work(codec, value_bytes=4 if precision.codec == "float32" else 2),
            unread_row_operations=2.0 * _last_mlp_weights(decoder) if keeps_last_row else 0.0,
        )

    def experts_of(self, num_items: int, *, alike: bool = True) -> float:
        """Different experts of a layer that so many items ask for, routed apart and evenly; with
        `alike` False no two of them are the same."""
        if not alike:
            return min(num_items * self.top_k, self.num_experts)
        kept = (1 - self.top_k / self.num_experts) ** num_items
        return self.num_experts * (1 - kept)

    def step_bytes(self, num_items: int, context_rows: int, *, alike: bool = True) -> float:
        """Read from memory in a step, the experts being there."""
        experts = self.num_moe_layers * self.experts_of(num_items, alike=alike) * self.expert_bytes
        cache = num_items * context_rows * self.cache_row_bytes
        return self.dense_bytes + self.head_bytes + experts + cache

    def step_operations(self, num_items: int) -> float:
        return num_items * (self.row_operations + self.head_operations)

    @property
    def all_expert_bytes(self) -> int:
        """Every routed expert."""
        return self.num_moe_layers * self.num_experts * self.expert_bytes

    def prefill_bytes(self, num_rows: int) -> float:
        """Weights that the rows of a question read; an expert once, however many rows ask."""
        alone = min(self.num_moe_layers, int(self.unread_row_operations > 0))  # the last layer
        wanted = (self.num_moe_layers - alone) * self.experts_of(num_rows)
        wanted += alone * self.experts_of(1)
        return self.dense_bytes + self.head_bytes + wanted * self.expert_bytes

    def prefill_operations(self, num_rows: int) -> float:
        return num_rows * self.row_operations - (num_rows - 1) * self.unread_row_operations

    def encoder_operations(self, num_frames: int) -> float:
        """Of a window of so many encoder frames."""
        encoder = self.encoder
        attention = 4.0 * encoder.num_layers * encoder.width * num_frames**2
        return 2.0 * num_frames * self.encoder_row_weights + attention


def codec_work(codec: CodecSpec, *, value_bytes: int) -> CodecWork:
    """What each convolution multiplies and reads, by its rate, and the activations between.

    Source: the architecture of the `snac` package's decoder.
    """
    rows, kernel = codec.frame_samples // prod(codec.decoder_rates), 7
    width, inputs = codec.decoder_dim, codec.latent_dim
    layers = [(rows, len(codec.vq_strides) * codec.codebook_dim * inputs)]  # (rows, weights)
    if codec.depthwise:
        layers += [(rows, inputs * kernel), (rows, inputs * width)]
    else:
        layers += [(rows, inputs * width * kernel)]
    activations = rows * width
    for stride in codec.decoder_rates:
        halved = width // 2
        layers += [(rows, width * 2 * stride * halved)]  # transposed: two taps a sample
        rows *= stride
        wide = halved * kernel * (1 if codec.depthwise else halved)
        layers += 3 * [(rows, wide), (rows, halved * halved)]
        activations += 6 * rows * halved
        width = halved
    layers += [(rows, width * kernel)]
    return CodecWork(
        operations=2.0 * sum(num_rows * weights for num_rows, weights in layers),
        weight_bytes=float(value_bytes * sum(weights for _, weights in layers)),
        activations=float(activations),
    )


def _weights(shapes: Iterable[Shape]) -> int:
    return sum(prod(shape) for shape in shapes if len(shape) > 1)


def _expert_weights(decoder: DecoderSpec) -> int:
    """Of the routed experts of one row."""
    one = 3 * decoder.width * decoder.expert_ffn_width
    return len(decoder.moe_layers) * decoder.top_k * one


def _last_mlp_weights(decoder: DecoderSpec) -> int:
    """Of the last layer's MLP that one row meets: its routed and its shared experts."""
    if decoder.num_layers - 1 not in decoder.moe_layers:
        return 3 * decoder.width * decoder.dense_ffn_width
    one = 3 * decoder.width * decoder.expert_ffn_width
    return (decoder.top_k + decoder.num_shared_experts) * one


def _encoder_row_weights(encoder: EncoderSpec) -> int:
    """Matrices that every encoder frame passes; the first convolution runs at twice the rate."""
    width = encoder.width
    layer = 4 * width * width + 2 * width * encoder.ffn_width
    return encoder.num_layers * layer + 2 * 3 * encoder.num_mel_bins * width + 3 * width * width
