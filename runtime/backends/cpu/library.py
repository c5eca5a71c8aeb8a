"""The CPU library, bound by ctypes: native/cpu/deeptalk_cpu.h has every call's contract.

`pip install` builds it where there is a C++ compiler. Calls release the interpreter's lock. Every
call goes through a context, which keeps the list of open objects.

Only `span` turns an array into an address. It passes the array's length, and the library checks
sizes against lengths. ctypes silently cuts integers to 32 bits; this module refuses integers that
do not fit.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import deeptalk_edge
from deeptalk_edge import host
from deeptalk_edge.errors import BackendError
from deeptalk_edge.lifetime import Lifetime

log = logging.getLogger(__name__)

LIBRARY = Path(deeptalk_edge.__file__).parent / "libdeeptalk_cpu.so"

OK, REFUSED, NOT_FINITE, EXPERT_ABSENT, OUT_OF_RANGE = range(5)

CACHE_KINDS = {"bfloat16": 0, "int8": 1}

_FAULTS = {
    NOT_FINITE: "an activation is NaN or infinite; the weights or the input are damaged",
    EXPERT_ABSENT: "an expert that a token chose is not in its table",
    OUT_OF_RANGE: "an id lies outside its table",
}


class Structure(ctypes.Structure):
    """A structure whose values come from files. Raises ValueError for an integer that its field
    cannot hold.

    Span, Table and Pass hold sizes of arrays in memory and need no such check.
    """

    def __init__(self, *values: Any, **named: Any) -> None:
        super().__init__(*values, **named)
        fields = (field[0] for field in self._fields_)
        for name, value in (named | dict(zip(fields, values, strict=False))).items():
            held = getattr(self, name)
            if isinstance(value, int) and held != value:
                raise ValueError(f"{name} = {value}: the kernels' field holds {held} of it")


class Int32(c_int32):
    """An integer argument of a call. Raises ValueError if 32 bits do not hold it."""

    @classmethod
    def from_param(cls, value: int) -> c_int32:
        if not -(1 << 31) <= value < 1 << 31:
            raise ValueError(f"{value}: the kernels take 32 bits")
        return c_int32(value)


class Span(ctypes.Structure):
    """`dt_span`, and `dt_room`, which a call writes. It does not keep its array alive."""

    _fields_ = (("data", c_void_p), ("bytes", c_int64))


class Matrix(Structure):
    """`dt_matrix`: weights and scales, their types and sizes."""

    _fields_ = (
        ("weights", Span),
        ("scales", Span),
        ("rows", c_int32),
        ("columns", c_int32),
        ("group", c_int32),
    )


class Record(Structure):
    """`dt_record`: offsets of the sections of a packed expert."""

    _fields_ = (
        *((name, c_int32) for name in ("width", "ffn_width", "group")),
        *((name, c_int64) for name in ("gate_up", "down", "gate_up_scales", "down_scales")),
    )


class Table(ctypes.Structure):
    """`dt_table`: addresses of experts' records, 0 for absent ones, and the bytes at each."""

    _fields_ = (("addresses", Span), ("record_bytes", c_int64))


class Layer(Structure):
    """`dt_layer`."""

    _fields_ = (
        ("record", Record),
        ("own_record", Record),
        *((name, Matrix) for name in ("qkv", "key_up", "value_up", "out")),
        *((name, Span) for name in ("attention_norm", "latent_norm", "mlp_norm")),
        *((name, Span) for name in ("router", "own_mlps")),
    )


class DecoderSizes(Structure):
    """`dt_decoder_spec`."""

    _fields_ = (
        *(
            (name, c_int32)
            for name in ("width", "num_layers", "heads", "nope", "rope", "value", "latent")
        ),
        *((name, c_int32) for name in ("num_experts", "top_k", "normalise_top_k")),
        *((name, c_int32) for name in ("vocabulary", "num_codebooks", "cache_kind", "max_tokens")),
        *(
            (name, c_float)
            for name in ("norm_epsilon", "softmax_scale", "rope_amplitude", "routed_scale")
        ),
        ("cache_rows", c_int64),
        ("rope_frequencies", Span),
        ("final_norm", Span),
        *((name, Matrix) for name in ("table", "head")),
        ("layers", Span),
    )


class Pass(ctypes.Structure):
    """`dt_pass`."""

    _fields_ = (
        ("shared", Span),
        ("caches", Span * 2),
        *((name, c_int32) for name in ("num_items", "num_rows", "position", "num_shared")),
    )


_CALLS: dict[str, tuple[Any, ...]] = {
    "dt_path_name": (c_char_p, Int32),
    "dt_open": (c_void_p, Int32, Int32),
    "dt_close": (None, c_void_p),
    "dt_threads": (c_int32, c_void_p),
    "dt_message": (c_char_p, c_void_p),
    "dt_linear": (c_int32, c_void_p, POINTER(Matrix), Int32, Span, Int32, Span),
    "dt_moe": (
        *(c_int32, c_void_p, POINTER(Record), POINTER(Table), Int32),
        *(Span, Int32, Span, Span, Int32, Span),
    ),
    "dt_cache_row_bytes": (c_int64, c_void_p, Int32, Int32, Int32),
    "dt_cache_write": (c_int32, c_void_p, Int32, Int32, Int32, Span, Span),
    "dt_attend": (c_int32, c_void_p, *(Int32,) * 4, POINTER(Pass), Span, Span),
    "dt_snake": (c_int32, c_void_p, Span, Span, Int32, Int32, Span),
    "dt_read": (c_int64, c_void_p, Span),
    "dt_decoder_open": (c_void_p, c_void_p, POINTER(DecoderSizes)),
    "dt_decoder_close": (None, c_void_p),
    "dt_begin": (c_int32, c_void_p, POINTER(Pass), Span, Span, Span),
    "dt_run": (c_int32, c_void_p, c_int32, c_int32, Span),  # layers, a number checked at load
    "dt_wave": (c_int32, c_void_p, c_int32, POINTER(Table)),
    "dt_routed": (c_int32, c_void_p, *(POINTER(Span),) * 3),
    "dt_head": (c_int32, c_void_p, Span),
    "dt_codec_open": (c_void_p, c_void_p, c_void_p),
    "dt_codec_close": (None, c_void_p),
    "dt_codec_state_size": (c_int64, c_void_p),
    "dt_codec_run": (c_int32, c_void_p, c_void_p),
}
"""Result and argument types of each call."""


class CpuLibrary:
    """The loaded library: its kernel paths and the contexts of calls."""

    def __init__(self, path: Path | None = None) -> None:
        """Load the library at `path`; the default is the installed one.

        Raises BackendError if it is missing or does not load.
        """
        path = path or LIBRARY
        try:
            self.calls: Any = ctypes.CDLL(str(path))
        except OSError as error:
            raise BackendError(
                f"{path}: the native CPU library is missing or does not load ({error}); install a "
                "C++ compiler and deeptalk-edge again, or choose the backend ort"
            ) from error
        calls = self.calls
        for name, (result, *arguments) in _CALLS.items():
            call = getattr(calls, name)
            call.restype, call.argtypes = result, arguments

    @property
    def path_names(self) -> list[str]:
        """Names of the kernel paths that this processor runs, the best one first."""
        names: list[str] = []
        while (name := self.calls.dt_path_name(len(names))) is not None:
            names.append(name.decode())
        return names


class CpuContext:
    """A kernel path, its threads, and the objects opened on them. One owner: a second concurrent
    call is refused. A close during a call takes effect when the call returns."""

    def __init__(self, library: CpuLibrary, *, path: str | None = None, threads: int = 1) -> None:
        """Open `path`, by default the best one. Raises BackendError if this processor lacks it."""
        names = library.path_names
        if path is not None and path not in names:
            raise BackendError(f"kernel path {path}: this processor runs {', '.join(names)}")
        self.calls = library.calls
        self.path = path or names[0]
        self.handle: int | None = self.calls.dt_open(names.index(self.path), threads)
        if self.handle is None:
            raise BackendError(f"the native library does not start with {threads} threads")
        self._opened = ExitStack()
        self._opened.callback(self.calls.dt_close, self.handle)
        self._lifetime = Lifetime("the native context", self._opened.close)
        weakref.finalize(self, self._lifetime.close)
        found = self.calls.dt_threads(self.handle)
        if found < threads:
            _say_fewer_threads(threads, found)

    def close(self) -> None:
        """Give everything back; calls are refused from now on. Idempotent."""
        self._lifetime.close()

    def open(self, opening: Callable[..., int | None], closing: Any, *args: Any) -> int:
        """Open a decoder or a codec, which is closed with the context.

        Raises ValueError with the library's message if it refuses, UsageError as `call` does.
        """
        with self._lifetime:
            opened = opening(self.handle, *args)
            if opened is None:
                raise ValueError(self._message())
            self._opened.callback(closing, opened)
            return opened

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the library.

        Raises UsageError if the context is closed, busy, or belongs to another process.
        """
        with self._lifetime:
            return function(*args)

    def run(self, call: str, function: Callable[..., int], *args: Any) -> None:
        """Make a call that returns a status.

        Raises by that status: ValueError for sizes, BackendError for values. UsageError as `call`.
        """
        with self._lifetime:
            status = function(*args)
            if status == REFUSED:
                raise ValueError(f"{call}: {self._message()}")
        if status != OK:
            raise BackendError(f"{call}: {_FAULTS[status]}")

    def _message(self) -> str:
        message: bytes = self.calls.dt_message(self.handle)
        return message.decode()

    def linear(self, matrix: Matrix, x: NDArray[np.float32], *, heads: int = 1) -> Any:
        """Multiply x (N, heads x columns) by a matrix per head: (N, rows)."""
        y = np.empty((len(x), max(matrix.rows, 0)), np.float32)
        rows = dense(x, np.float32, (len(x), heads * matrix.columns))
        call = self.calls.dt_linear
        self.run("linear", call, self.handle, byref(matrix), heads, rows, len(x), span(y))
        return y

    def add_experts(
        self,
        record: Record,
        table: Table,
        x: NDArray[np.float32],
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
        y: NDArray[np.float32],
        *,
        num_own: int = 0,
    ) -> None:
        """y (N, C) += the experts of ids (N, k) and the table's last `num_own` experts."""
        num_tokens, top_k = ids.shape
        self.run(
            "experts",
            self.calls.dt_moe,
            self.handle,
            byref(record),
            byref(table),
            num_own,
            dense(x, np.float32, (num_tokens, record.width)),
            num_tokens,
            dense(ids, np.int64, (num_tokens, top_k)),
            dense(weights, np.float32, (num_tokens, top_k)),
            top_k,
            dense(y, np.float32, (num_tokens, record.width)),
        )

    def cache_row_bytes(self, latent: int, rope: int, kind: str) -> int:
        """Bytes of a cache row. Raises ValueError if the kernels do not take such rows."""
        with self._lifetime:
            found = self.calls.dt_cache_row_bytes(self.handle, latent, rope, CACHE_KINDS[kind])
            if found < 0:
                raise ValueError(f"cache: {self._message()}")
        return int(found)

    def snake(self, x: NDArray[np.float32], alpha: NDArray[np.float32]) -> Any:
        """x + sin(alpha x)^2 / alpha for x (channels, samples), alpha (channels,)."""
        y = np.empty_like(x)
        self.run(
            "snake",
            self.calls.dt_snake,
            self.handle,
            dense(x, np.float32, x.shape),
            dense(alpha, np.float32, (len(x),)),
            *x.shape,
            span(y),
        )
        return y

    def read(self, array: NDArray[np.uint8]) -> None:
        """Read every byte once: the memory roofline for the other calls."""
        self.call(self.calls.dt_read, self.handle, span(array))


def int32s(name: str, values: Sequence[int], most: int) -> Any:
    """Return a C array of `most` integers with these values.

    Raises ValueError if there are more, or if 32 bits do not hold one.
    """
    if len(values) > most:
        raise ValueError(f"{name} has {len(values)} entries, the kernels take {most}")
    return (c_int32 * most)(*(Int32.from_param(value).value for value in values))


@cache
def _say_fewer_threads(asked: int, found: int) -> None:
    """Log once per process, not per context."""
    log.warning("the system refuses threads: %d of %d compute; %s", found, asked, host.MORE_THREADS)


def span(array: NDArray[Any] | None) -> Span:
    """The span of a whole array, empty for None. The caller keeps the array alive.

    Raises ValueError if it has gaps.
    """
    if array is None:
        return Span(None, 0)
    if not array.flags.c_contiguous:
        raise ValueError(f"expected a dense array, found {array.dtype} {array.shape} with gaps")
    return Span(array.ctypes.data, array.nbytes)


def span_of(structures: Any) -> Span:
    """The span of an array of structures. The caller keeps the array alive."""
    return Span(ctypes.addressof(structures), ctypes.sizeof(structures))


def dense(array: NDArray[Any], dtype: type, shape: tuple[int, ...], name: str = "array") -> Span:
    """The span of an array that must have this type and shape.

    Raises ValueError with its name if it does not.
    """
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"{name}: expected dense {np.dtype(dtype)} {shape}, found {array.dtype} {array.shape}"
        )
    return span(array)
