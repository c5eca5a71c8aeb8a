"""The shapes that engines are built for, read off the graphs' own free dimensions.

engine    what it computes                             its profiles
encoder   log-mel of the whole window to features      one, all is fixed
embed     rows and features to the decoder's input     one row of each item; up to 256 rows of one
step      the whole decoder, export/graphs/step.py     one row, twice; with the plugin, up to 256
head      hidden states to logits                      one row of each item
codec     streaming SNAC                               1 to 16 frames

With the plugin one engine serves decoding and prefill. They lay the constants out differently, so
it would hold float weights twice: they are inputs. The native form has no prefill: its caller steps
through the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from deeptalk_edge.bundle.target import MoeForm

Span = tuple[int, int, int]
"""The least, usual and greatest size of a free dimension."""
Spans = Mapping[str, Span]
ShapeRange = dict[str, tuple[tuple[int, ...], ...]]
"""An input's least, usual and greatest shape, as the manifest holds them."""

_ONE_ROW: Span = (1, 1, 1)
_MANY_ROWS: Span = (1, 64, 256)
_MAX_ELEMENTS = 2**31 - 1  # of one tensor


def step_shape_ranges(
    graph: Path,
    *,
    moe: MoeForm,
    context_rows: int,
    num_experts: int,
    all_experts: int,
    num_items: int = 1,
) -> list[ShapeRange]:
    """Decoding over a quarter of the cache and over all of it; prefill of one item over all of it.

    The cache's rows are fixed in each, for TensorRT-RTX pads and copies a cache of free length in
    every step. Layers may share one arena, so it may have slots for the experts of all of them.
    """
    slots = (1, num_experts, all_experts)
    forms = [
        (max(1, context_rows // 4), _ONE_ROW, num_items),
        (context_rows, _ONE_ROW, num_items),
    ]
    if moe == "plugin":
        forms.append((context_rows, _MANY_ROWS, 1))
    return [
        _shape_range(graph, {"S": (cached,) * 3, "T": rows, "B": (items,) * 3, "slots": slots})
        for cached, rows, items in forms
    ]


def embed_shape_ranges(graph: Path, num_items: int) -> list[ShapeRange]:
    """One row of each item, and many of one: a context whose step lies in a CUDA graph keeps its
    shapes."""
    return [
        _shape_range(graph, {"B": (num_items,) * 3, "T": _ONE_ROW}),
        _shape_range(graph, {"B": (1, 1, 1), "T": _MANY_ROWS}),
    ]


def head_shape_ranges(graph: Path, num_items: int) -> list[ShapeRange]:
    return [_shape_range(graph, {"B": (num_items,) * 3})]


def codec_shape_ranges(graph: Path, noise_rates: Sequence[int]) -> list[ShapeRange]:
    frames = (1, 4, 16)
    noise = {f"N_{rate}": (rate, 4 * rate, 16 * rate) for rate in noise_rates}
    return [_shape_range(graph, {"A": frames, **noise})]


def _shape_range(graph: Path, spans: Spans) -> ShapeRange:
    """Shapes of every input with a free dimension; a name such as slots_3 is one of `slots`."""
    ranges: ShapeRange = {}
    for value in onnx.load(str(graph), load_external_data=False).graph.input:
        dims = value.type.tensor_type.shape.dim
        if not any(dim.dim_param for dim in dims):
            continue
        fixed = math.prod(dim.dim_value for dim in dims if not dim.dim_param)
        sizes = [_span(dim, spans, _MAX_ELEMENTS // fixed) for dim in dims]
        ranges[value.name] = tuple(zip(*sizes, strict=True))
    return ranges


def _span(dim: onnx.TensorShapeProto.Dimension, spans: Spans, most: int) -> Span:
    if not dim.dim_param:
        return (dim.dim_value,) * 3
    least, usual, greatest = spans["slots" if "slots" in dim.dim_param else dim.dim_param]
    return least, min(usual, most), min(greatest, most)
