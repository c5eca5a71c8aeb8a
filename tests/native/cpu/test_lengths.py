"""The library refuses impossible sizes and arrays that are too short, and names them."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from ctypes import byref, c_int32
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.runtime.backends.cpu.codec import CodecCall, CodecSizes
from deeptalk_edge.runtime.backends.cpu.library import (
    CpuContext,
    CpuLibrary,
    DecoderSizes,
    Int32,
    Layer,
    Matrix,
    Pass,
    Span,
    Table,
    dense,
    int32s,
    span,
    span_of,
)
from deeptalk_edge.runtime.backends.cpu.weights import record_of
from tests.native.cpu.references import random_records, stored

Array = NDArray[Any]
Change = Callable[["Decoder"], None]

RECORD = RecordFormat(dtype="int8", width=32, ffn_width=16)
WIDTH, HEADS, NOPE, ROPE, VALUE, LATENT, EXPERTS, VOCABULARY, ROWS = 32, 2, 16, 4, 16, 24, 3, 11, 8


class Decoder:
    """One routed layer of random weights and the arguments of a pass, with arrays of exactly the
    needed lengths. Tests change `sizes`, `layer` and the rest before they open and run it."""

    def __init__(self, library: CpuLibrary) -> None:
        self._random, self._kept = np.random.default_rng(0), list[Any]()
        self.context = CpuContext(library)
        records, _ = random_records(RECORD, EXPERTS + 1, self._random)
        self.addresses = np.array([each.ctypes.data for each in records[:EXPERTS]], np.uint64)
        self.own_mlps = (Span * 1)(span(records[EXPERTS]))
        qkv_rows = HEADS * NOPE + (HEADS + 1) * ROPE + LATENT
        self.layer = Layer(
            record=record_of(RECORD),
            own_record=record_of(RECORD),
            qkv=self._matrix(qkv_rows, WIDTH),
            key_up=self._matrix(HEADS * LATENT, NOPE),
            value_up=self._matrix(HEADS * VALUE, LATENT),
            out=self._matrix(WIDTH, HEADS * VALUE),
            attention_norm=self._floats(WIDTH),
            latent_norm=self._floats(LATENT),
            mlp_norm=self._floats(WIDTH),
            router=self._floats(EXPERTS * WIDTH),
            own_mlps=span_of(self.own_mlps),
        )
        self.sizes = DecoderSizes(
            **{"width": WIDTH, "num_layers": 1, "heads": HEADS, "nope": NOPE, "rope": ROPE},
            **{"value": VALUE, "latent": LATENT, "num_experts": EXPERTS, "top_k": 2},
            **{"vocabulary": VOCABULARY, "num_codebooks": 2, "max_tokens": 6},
            **{"norm_epsilon": 1e-6, "softmax_scale": 0.2, "rope_amplitude": 1, "routed_scale": 1},
            cache_rows=ROWS,
            rope_frequencies=self._floats(ROPE // 2),
            final_norm=self._floats(WIDTH),
            table=self._matrix(VOCABULARY, WIDTH),
            head=self._matrix(VOCABULARY, WIDTH),
            layers=span_of(self.layer),
        )
        row_bytes = self.context.cache_row_bytes(LATENT, ROPE, "bfloat16")
        cache = self._keep(np.zeros(ROWS * row_bytes, np.uint8))
        self.where = Pass(Span(), (span(cache), Span()), 1, 3, 0, 0)
        self.rows = span(self._keep(np.ones((3, 3), np.int64)))
        self.features = span(self._keep(np.ones((3, WIDTH), np.float32)))
        self.audio_mask = span(self._keep(np.ones(3, np.bool_)))
        self.table = Table(span(self.addresses), RECORD.content_bytes)
        self.logits = span(self._keep(np.zeros(VOCABULARY, np.float32)))
        self.last_stage = 2
        self._kept += records

    def refusal(self) -> str:
        """Open the decoder and run a pass; returns the first refusal, or None."""
        calls, handle = self.context.calls, self.context.handle
        decoder = calls.dt_decoder_open(handle, byref(self.sizes))
        statuses = [] if decoder else [1]
        if decoder:
            tables = span_of(self.table)
            begun = self.rows, self.features, self.audio_mask
            for call, arguments in {
                "dt_begin": (byref(self.where), *begun),
                "dt_run": (0, self.last_stage, tables),
                "dt_head": (self.logits,),
            }.items():
                if not any(statuses):
                    statuses.append(getattr(calls, call)(decoder, *arguments))
            calls.dt_decoder_close(decoder)
        message = calls.dt_message(handle).decode()
        self.context.close()
        return str(message) if any(statuses) else ""

    def _keep(self, array: Array) -> Array:
        self._kept.append(array)
        return array

    def _floats(self, size: int) -> Span:
        return span(self._keep(self._random.standard_normal(size).astype(np.float32)))

    def _matrix(self, rows: int, columns: int) -> Matrix:
        matrix = stored(self._random.standard_normal((rows, columns)).astype(np.float32), 0)
        self._kept.append(matrix)
        return matrix.native


@pytest.fixture
def decoder(library: CpuLibrary) -> Decoder:
    return Decoder(library)


def test_a_decoder_whose_arrays_are_just_long_enough_runs(decoder: Decoder) -> None:
    assert decoder.refusal() == ""


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 0, "width = 0"),
        ("width", 1 << 20, "width = 1048576, expected 1 to 16384"),
        ("width", WIDTH + 16, "bytes of final_norm = 128, expected 4 for each of 48"),
        ("num_layers", 0, "num_layers = 0"),
        ("num_layers", -1, "num_layers = -1"),
        ("num_layers", 10**9, "num_layers = 1000000000"),
        ("num_layers", 2, "bytes of layers"),
        *((name, 0, f"{name} = 0, expected") for name in ("heads", "nope", "value", "latent")),
        ("heads", -1, "heads = -1"),
        ("heads", 1 << 30, "heads = 1073741824"),
        ("heads", HEADS + 1, r"layers\.0\.qkv rows"),
        ("nope", 2**31 - 1, "nope = 2147483647"),
        ("rope", 5, "rope = 5, expected an even number"),
        ("rope", -2, "rope = -2"),
        ("rope", 6, "bytes of rope_frequencies = 8, expected 4 for each of 3"),
        ("latent", 2**31 - 1, "latent = 2147483647"),
        ("num_experts", 0, "num_experts = 0"),
        ("num_experts", 4, r"bytes of layers\.0\.router"),
        ("top_k", 0, "top_k = 0"),
        ("top_k", 4, "top_k = 4, expected 1 to 3"),
        ("vocabulary", 0, "vocabulary = 0"),
        ("vocabulary", VOCABULARY + 1, "table rows = 11, expected 12"),
        ("num_codebooks", 0, "num_codebooks = 0"),
        ("num_codebooks", -1, "num_codebooks = -1"),
        ("num_codebooks", 2**31 - 1, "num_codebooks = 2147483647"),
        ("num_codebooks", 3, "bytes of rows = 72, expected 8 for each of 12"),
        ("cache_kind", 2, "cache_kind = 2"),
        ("max_tokens", 0, "max_tokens = 0"),
        ("max_tokens", 2**31 - 1, "max_tokens = 2147483647"),
        ("max_tokens", 2, "tokens = 3, expected 1 to 2"),
        ("cache_rows", 0, "cache_rows = 0"),
        ("cache_rows", 10**15, "cache_rows = 1000000000000000"),
        ("cache_rows", ROWS + 1, "bytes of a cache"),
        ("norm_epsilon", np.nan, "norm_epsilon is not a finite number"),
        ("norm_epsilon", -1.0, "norm_epsilon is below 0"),
        ("softmax_scale", np.inf, "softmax_scale is not a finite number"),
        ("rope_amplitude", np.nan, "rope_amplitude is not a finite number"),
        ("routed_scale", -np.inf, "routed_scale is not a finite number"),
    ],
)
def test_a_decoder_of_impossible_sizes_is_refused_by_the_fields_name(
    decoder: Decoder, field: str, value: float, message: str
) -> None:
    setattr(decoder.sizes, field, value)
    assert re.search(message, decoder.refusal())


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ("sizes.rope_frequencies", "bytes of rope_frequencies"),
        ("sizes.final_norm", "bytes of final_norm"),
        ("sizes.table.weights", "bytes of table weights"),
        ("sizes.table.scales", "bytes of table scales"),
        ("sizes.head.weights", "bytes of head weights"),
        ("sizes.head.scales", "bytes of head scales"),
        ("sizes.layers", "bytes of layers"),
        *(
            (f"layer.{matrix}.{part}", rf"bytes of layers\.0\.{matrix} {part}")
            for matrix in ("qkv", "key_up", "value_up", "out")
            for part in ("weights", "scales")
        ),
        *(
            (f"layer.{name}", rf"bytes of layers\.0\.{name}")
            for name in ("attention_norm", "latent_norm", "mlp_norm", "router")
        ),
        ("own_mlps.0", r"bytes of layers\.0\.own_mlps"),
        ("rows", "bytes of rows"),
        ("features", "bytes of features"),
        ("audio_mask", "bytes of audio_mask"),
        ("where.caches.0", "bytes of a cache"),
        ("table.addresses", "bytes of a table of experts"),
        ("logits", "bytes of logits"),
    ],
)
def test_an_array_that_is_a_byte_too_short_is_refused_by_its_name(
    decoder: Decoder, array: str, message: str
) -> None:
    found: Any = decoder
    for step in array.split("."):
        found = found[int(step)] if step.isdigit() else getattr(found, step)
    found.bytes -= 1
    assert re.search(message, decoder.refusal())


def change(**fields: Any) -> Change:
    """Set fields by their paths, such as `where__position`."""

    def apply(decoder: Decoder) -> None:
        for path, value in fields.items():
            *owners, name = path.split("__")
            owner: Any = decoder
            for step in owners:
                owner = getattr(owner, step)
            setattr(owner, name, value)

    return apply


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (change(where__num_items=0), "items = 0"),
        (change(where__num_items=2), "bytes of a cache"),
        (change(where__num_rows=-1), "rows = -1"),
        (change(where__position=-1), "position = -1"),
        (change(where__position=2**31 - 1), "position = 2147483647"),
        (change(where__position=ROWS - 2), "rows of a cache = 9, expected 1 to 8"),
        (change(where__num_shared=1), "shared rows = 1"),
        (change(where__position=2, where__num_shared=1), "bytes of the shared cache"),
        (change(last_stage=3), "the last stage = 3"),
        (change(table__record_bytes=RECORD.content_bytes - 1), "record_bytes of a table"),
        (change(layer__record__gate_up=-16), "gate_up of a record = -16"),
        (change(layer__record__down=1 << 50), "down of a record"),
        (change(layer__record__down_scales=RECORD.content_bytes), "record_bytes of a table"),
        (
            change(layer__own_record__down_scales=RECORD.content_bytes),
            r"bytes of layers\.0\.own_mlps",
        ),
        (change(layer__own_record__ffn_width=-16), "ffn_width of a record = -16"),
        (change(layer__own_record__width=16), "width of an own record = 16, expected 32"),
        (change(layer__record__gate_up_scales=2), "gate_up_scales of a record = 2, expected a mul"),
        (change(layer__record__ffn_width=-16), "ffn_width of a record = -16"),
        (change(layer__record__group=48), "group of a record = 48"),
        (change(layer__qkv__group=16), r"layers\.0\.qkv group = 16"),
        (change(layer__key_up__columns=8), r"layers\.0\.key_up columns = 8, expected 16"),
        (change(layer__record__width=-32), "width of a record = -32"),
        (change(layer__record__width=16), "width of a record = 16, expected 32"),
        (change(features=Span()), "bytes of features = 0"),
    ],
)
def test_an_impossible_pass_or_layer_is_refused(
    decoder: Decoder, apply: Change, message: str
) -> None:
    apply(decoder)
    assert re.search(message, decoder.refusal())


def test_an_array_at_an_odd_address_is_refused(decoder: Decoder) -> None:
    decoder.sizes.final_norm.data += 1
    assert re.search(r"address of final_norm = \d+, expected a multiple", decoder.refusal())


def test_a_record_at_an_odd_address_is_refused(decoder: Decoder) -> None:
    decoder.addresses += 2
    assert re.search("address of a record", decoder.refusal())


def test_a_stage_before_any_pass_is_refused(decoder: Decoder) -> None:
    calls, context = decoder.context.calls, decoder.context
    opened = calls.dt_decoder_open(context.handle, byref(decoder.sizes))
    tables = span_of(decoder.table)
    for call, *arguments in (
        (calls.dt_run, 0, 2, tables),
        (calls.dt_wave, 0, byref(decoder.table)),
        (calls.dt_head, decoder.logits),
    ):
        with pytest.raises(ValueError, match="no pass was begun"):
            context.run("", call, opened, *arguments)
    calls.dt_decoder_close(opened)


# ---- the codec ---------------------------------------------------------------------------------


def codec_sizes() -> CodecSizes:
    """Sizes of a small codec with at most 16,384 weights, without the weights."""
    return CodecSizes(
        **{"num_scales": 2, "vq_strides": int32s("", (2, 1), 8), "codebook_size": 5},
        **{"codebook_dim": 3, "latent_dim": 4, "width": 8, "num_blocks": 2},
        **{"rates": int32s("", (3, 2), 8), "is_depthwise": 0, "has_noise": 1},
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_scales", 0, "num_scales = 0"),
        ("num_scales", 9, "num_scales = 9, expected 1 to 8"),
        ("num_scales", 2**31 - 1, "num_scales = 2147483647"),
        ("num_blocks", 9, "num_blocks = 9"),
        ("num_blocks", -1, "num_blocks = -1"),
        ("vq_strides", (3, 2), "a vq_stride = 2, expected a divisor of the first"),
        ("vq_strides", (2, 0), "a vq_stride = 0"),
        ("vq_strides", (0, 1), r"vq_strides\[0\] = 0"),
        ("vq_strides", (10**9, 1), r"vq_strides\[0\] = 1000000000"),
        ("rates", (0, 2), "a rate = 0"),
        ("rates", (-3, 2), "a rate = -3"),
        ("rates", (3, 65), "a rate = 65"),
        ("rates", (64,) * 8, "samples of a frame"),
        ("codebook_size", 0, "codebook_size = 0"),
        ("codebook_dim", -1, "codebook_dim = -1"),
        ("latent_dim", 1 << 30, "latent_dim = 1073741824"),
        ("width", 6, "width = 6, expected a multiple of 2 to the power num_blocks"),
        ("width", 0, "width = 0"),
        ("weights", 16, "bytes of weights = 64, expected more"),
        (
            "weights",
            1 << 15,
            "bytes of weights = 131072, expected exactly those of the codec's sizes",
        ),
    ],
)
def test_a_codec_of_impossible_sizes_is_refused_by_the_fields_name(
    library: CpuLibrary, field: str, value: Any, message: str
) -> None:
    sizes, context = codec_sizes(), CpuContext(library)
    weights = np.zeros(value if field == "weights" else 1 << 14, np.float32)
    if isinstance(value, tuple):
        sizes.num_blocks = len(value) if field == "rates" else 2
        sizes.width = 256
        value = (c_int32 * 8)(*value)
    sizes.weights = span(weights)
    if field != "weights":
        setattr(sizes, field, value)
    calls = context.calls
    with pytest.raises(ValueError, match=message):
        context.open(calls.dt_codec_open, calls.dt_codec_close, byref(sizes))


FRAMES = 3


@pytest.fixture
def codec(library: CpuLibrary) -> tuple[CpuContext, int, CodecCall]:
    """A codec of zeros, and a call of it whose arrays are just long enough."""
    sizes, context = codec_sizes(), CpuContext(library)
    weights, opened = np.zeros(1 << 14, np.float32), None
    for count in range(16, len(weights), 16):
        sizes.weights = span(weights[:count])
        opened = opened or context.calls.dt_codec_open(context.handle, byref(sizes))
    assert opened is not None
    state = np.zeros(context.calls.dt_codec_state_size(opened), np.float32)
    arrays = {
        "codes": np.zeros((FRAMES, 3), np.int64),
        "state": state,
        "next_state": state.copy(),
        "pcm": np.zeros(FRAMES * 12, np.float32),
    }
    noise = [np.zeros(FRAMES * rate, np.float32) for rate in (6, 12)]
    call = CodecCall(
        **{name: span(array) for name, array in arrays.items()},
        **{"num_frames": FRAMES, "position": 0, "length": FRAMES},
        noise=(Span * 8)(*map(span, noise)),
    )
    call.kept = (weights, arrays, noise)
    return context, opened, call


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        *(({name: -1}, f"bytes of {name} ") for name in ("codes", "state", "next_state", "pcm")),
        ({"noise": 0}, "bytes of noise"),
        ({"noise": 1}, "bytes of noise"),
        ({"num_frames": FRAMES + 1}, "bytes of codes = 72, expected 8 for each of 12"),
        ({"num_frames": 0}, "num_frames = 0"),
        ({"num_frames": 2**31 - 1}, "num_frames = 2147483647"),
        ({"position": -1}, "position = -1"),
        ({"position": 1 << 62}, "position = "),
        ({"length": -(1 << 63)}, "length = -9223372036854775808"),
    ],
)
def test_an_impossible_call_of_the_codec_is_refused(
    codec: tuple[CpuContext, int, CodecCall], change: dict[str, int], message: str | None
) -> None:
    context, opened, call = codec
    for name, value in change.items():
        array = call.noise[value] if name == "noise" else getattr(call, name)
        if isinstance(array, Span):
            array.bytes -= 1
        else:
            setattr(call, name, value)
    refused = nullcontext() if message is None else pytest.raises(ValueError, match=message)
    with refused:
        context.run("codec", context.calls.dt_codec_run, opened, byref(call))
    context.calls.dt_codec_close(opened)


# ---- values that ctypes would cut or drop
# -------------------------------------------------------------


@pytest.mark.parametrize("value", [2**31, 2**32 + 5, -(2**31) - 1, 10**15])
def test_an_integer_beyond_its_field_is_refused_and_not_cut(value: int) -> None:
    with pytest.raises(ValueError, match=f"rows = {value}"):
        Matrix(rows=value)
    with pytest.raises(ValueError, match=f"width = {value}"):
        DecoderSizes(value)
    with pytest.raises(ValueError, match=str(value)):
        Int32.from_param(value)
    with pytest.raises(ValueError, match=str(value)):
        int32s("rates", (1, value), 8)


def test_more_numbers_than_a_field_has_are_refused_and_not_dropped() -> None:
    with pytest.raises(ValueError, match="rates has 9 entries, the kernels take 8"):
        int32s("rates", (2,) * 9, 8)


def test_an_array_with_gaps_or_of_another_kind_has_no_span() -> None:
    array = np.zeros((4, 6), np.float32)
    with pytest.raises(ValueError, match="with gaps"):
        span(array[:, ::2])
    with pytest.raises(ValueError, match=r"array: expected dense float64 \(4, 6\)"):
        dense(array, np.float64, (4, 6))
    with pytest.raises(ValueError, match=r"rows: expected dense float32 \(6, 4\)"):
        dense(array, np.float32, (6, 4), "rows")
