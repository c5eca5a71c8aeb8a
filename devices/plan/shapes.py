"""The weights of every graph as the exporter stores them: their shapes, from the sizes alone.

A list here mirrors the `weight` calls of the module that writes the graph, in any order. The
tests hold both to the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from deeptalk_edge.bundle.expert_record import PAGE_BYTES
from deeptalk_edge.bundle.precision import Precision
from deeptalk_edge.model.spec import CodecSpec, DecoderSpec, ModelSpec

Shape = tuple[int, ...]

_INLINE_BYTES = 1024  # as in graph.py: smaller weights stay in the graph
_CODEC_KERNEL = 7
_RESIDUAL_UNITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightShapes:
    """All weights of a model but its routed experts."""

    encoder: list[Shape]
    embedding: list[Shape]
    head: list[Shape]
    """None if it is the embedding."""
    segments: list[list[Shape]]
    codec: list[Shape]

    @classmethod
    def of(cls, model: ModelSpec, codec: CodecSpec, *, with_noise: bool) -> WeightShapes:
        return cls(
            encoder=encoder_shapes(model),
            embedding=embedding_shapes(model),
            head=[] if model.tied_head else embedding_shapes(model),
            segments=segment_shapes(model.decoder),
            codec=codec_shapes(codec, with_noise=with_noise),
        )

    @property
    def decoder(self) -> list[Shape]:
        return [shape for segment in self.segments for shape in segment]

    def bytes(self, precision: Precision) -> dict[str, int]:
        """By class of tensors."""
        return {
            "encoder": weight_bytes(self.encoder, precision.encoder),
            "decoder": weight_bytes(self.decoder, precision.decoder),
            "head": weight_bytes(self.embedding + self.head, precision.head),
            "codec": weight_bytes(self.codec, precision.codec),
        }


def stored_bytes(shapes: Iterable[Shape]) -> int:
    """Size of a graph's file of weights: float32, each on its own pages, the smallest inline."""
    return sum(_paged(4 * prod(shape)) for shape in shapes)


def _paged(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES if size >= _INLINE_BYTES else 0


def int8_encoder_bytes(model: ModelSpec) -> int:
    """Size of encoder.bin with int8 products: matrices and their scales, the rest in float32."""
    exact = encoder_shapes(model)
    exact.remove((model.encoder.max_frames, model.encoder.width))
    matrices = [shape for shape in exact if len(shape) == 2]
    others = [shape for shape in exact if len(shape) != 2]
    others += [(model.encoder.max_frames, model.encoder.width)]
    others += [(outputs,) for _, outputs in matrices]  # scales
    return stored_bytes(others) + sum(_paged(prod(shape)) for shape in matrices)


def weight_bytes(shapes: Sequence[Shape], dtype: str) -> int:
    """Bytes of these weights in a precision; int8 matrices have a float32 scale for each row."""
    if dtype == "int8":
        matrices = [shape for shape in shapes if len(shape) > 1]
        vectors = sum(4 * shape[0] for shape in shapes if len(shape) == 1)
        return vectors + sum(prod(shape) + 4 * max(shape) for shape in matrices)
    return sum(prod(shape) for shape in shapes) * (4 if dtype == "float32" else 2)


def encoder_shapes(model: ModelSpec) -> list[Shape]:
    """encoder.onnx: Whisper's encoder and the projector."""
    encoder = model.encoder
    width, ffn_width = encoder.width, encoder.ffn_width
    stem = [(width, encoder.num_mel_bins, 3), (width,), (width, width, 3), (width,)]
    layer = [
        *_norm(width),
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
        *_norm(width),
        (width, ffn_width),
        (ffn_width,),
        (ffn_width, width),
        (width,),
    ]
    projector = _swiglu(width, model.projector_width, model.decoder.width)
    positions = (encoder.max_frames, width)
    return [*stem, positions, *layer * encoder.num_layers, *_norm(width), *projector]


def embedding_shapes(model: ModelSpec) -> list[Shape]:
    """embedding.bin, which embed.onnx and head.onnx share; head.bin, if the head is not tied."""
    return [(model.vocabulary.size, model.decoder.width)]


def segment_shapes(decoder: DecoderSpec) -> list[list[Shape]]:
    """segment_00.onnx and so on: the decoder cut at every router."""
    dense = [*_attention(decoder), (decoder.width,)]
    dense += _swiglu(decoder.width, decoder.dense_ffn_width, decoder.width)
    routed = [*_attention(decoder), (decoder.width,), (decoder.num_experts, decoder.width)]
    if decoder.num_shared_experts:
        routed += _swiglu(decoder.width, decoder.shared_ffn_width, decoder.width)
    segments = [list(routed) for _ in decoder.moe_layers]
    segments[0] = dense * decoder.num_dense_layers + segments[0]
    return [*segments, [(decoder.width,)]]


def codec_shapes(codec: CodecSpec, *, with_noise: bool) -> list[Shape]:
    """codec.onnx: SNAC's decoder with its weight norms folded."""
    width, kernel = codec.decoder_dim, _CODEC_KERNEL
    num_scales = len(codec.vq_strides)
    shapes: list[Shape] = [(codec.codebook_size, codec.codebook_dim)] * num_scales
    shapes += [(num_scales * codec.codebook_dim, codec.latent_dim), (codec.latent_dim,)]
    if codec.depthwise:
        shapes += [(codec.latent_dim, 1, kernel), (codec.latent_dim,)]
        shapes += [(width, codec.latent_dim, 1), (width,)]
    else:
        shapes += [(width, codec.latent_dim, kernel), (width,)]
    for stride in codec.decoder_rates:
        halved = width // 2
        shapes += [(width,), (width,), (2 * width, stride * halved), (stride * halved,)]
        if with_noise and codec.noise:
            shapes.append((halved, halved, 1))
        wide = (halved, 1 if codec.depthwise else halved, kernel)
        unit = [(halved,), (halved,), wide, (halved,), (halved,), (halved,), (halved, halved, 1)]
        shapes += [*unit, (halved,)] * _RESIDUAL_UNITS
        width = halved
    return [*shapes, (width,), (width,), (1, width, kernel), (1,)]


def _attention(decoder: DecoderSpec) -> list[Shape]:
    """Norm, projections, the absorbed halves of kv_b, and the output projection."""
    heads, width = decoder.num_heads, decoder.width
    return [
        (width,),
        (width, heads * (decoder.nope_dim + decoder.rope_dim) + decoder.cache_width),
        (decoder.latent_dim,),
        (heads, decoder.nope_dim, decoder.latent_dim),
        (heads, decoder.cache_width, decoder.value_dim),
        (heads * decoder.value_dim, width),
    ]


def _swiglu(width: int, ffn_width: int, width_out: int) -> list[Shape]:
    return [(width, 2 * ffn_width), (ffn_width, width_out)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]
