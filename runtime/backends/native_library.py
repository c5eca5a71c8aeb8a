"""The native CPU library, bound by ctypes: native/cpu/deeptalk_cpu.h has every call's contract.

`pip install` builds it where there is a C++ compiler. Calls release the interpreter's lock; arrays
are checked here, sizes there. Every call goes through its context, which knows what is still open.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
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


class Matrix(Structure):
    """`dt_matrix`: addresses of weights and scales, and what they are."""

    _fields_ = (
        ("weights", c_void_p),
        ("scales", c_void_p),
        ("rows", c_int32),
        ("columns", c_int32),
        ("group", c_int32),
    )


class Record(Structure):
    """`dt_record`: where the sections of a packed expert lie."""

    _fields_ = (
        *((name, c_int32) for name in ("width", "ffn_width", "group")),
        *((name, c_int64) for name in ("gate_up", "down", "gate_up_scales", "down_scales")),
    )


class Layer(Structure):
    """`dt_layer`."""

    _fields_ = (
        ("record", Record),
        *((name, Matrix) for name in ("qkv", "key_up", "value_up", "out")),
        *((name, c_void_p) for name in ("attention_norm", "latent_norm", "mlp_norm")),
        ("router", c_void_p),
        ("own_mlps", c_void_p),
        ("num_own_mlps", c_int32),
    )


class DecoderSizes(Structure):
    """`dt_decoder_spec`."""

    _fields_ = (
        *(
            (name, c_int32)
            for name in ("width", "num_layers", "heads", "nope", "rope", "value", "latent")
        ),
        *((name, c_int32) for name in ("num_experts", "top_k", "normalise_top_k")),
        *((name, c_int32) for name in ("num_codebooks", "cache_kind", "max_tokens")),
        *(
            (name, c_float)
            for name in ("norm_epsilon", "softmax_scale", "rope_amplitude", "routed_scale")
        ),
        ("cache_rows", c_int64),
        ("rope_frequencies", c_void_p),
        ("final_norm", c_void_p),
        ("table", Matrix),
    )


class Pass(Structure):
    """`dt_pass`."""

    _fields_ = (
        ("shared", c_void_p),
        ("caches", c_void_p * 2),
        *((name, c_int32) for name in ("num_items", "num_rows", "position", "num_shared")),
    )


class NativeLibrary:
    """The loaded library: its paths, and contexts to call it in."""

    def __init__(self, path: Path | None = None) -> None:
        """Without a path the one that was installed with us.

        Raises BackendError if it is not there or does not load.
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
        calls.dt_path_name.restype = c_char_p
        calls.dt_open.restype = c_void_p
        calls.dt_threads.argtypes = (c_void_p,)
        calls.dt_message.restype = c_char_p
        calls.dt_message.argtypes = calls.dt_close.argtypes = (c_void_p,)
        calls.dt_cache_row_bytes.restype = calls.dt_read.restype = c_int64
        calls.dt_decoder_open.restype = c_void_p
        calls.dt_decoder_open.argtypes = (c_void_p, POINTER(DecoderSizes), POINTER(Layer))
        calls.dt_decoder_close.argtypes = (c_void_p,)
        calls.dt_begin.argtypes = (c_void_p, POINTER(Pass), c_void_p, c_void_p, c_void_p)
        calls.dt_run.argtypes = (c_void_p, c_int32, c_int32, c_void_p)
        calls.dt_wave.argtypes = (c_void_p, c_int32, c_void_p)
        calls.dt_routed.argtypes = (c_void_p, *(POINTER(c_void_p),) * 3)
        calls.dt_head.argtypes = (c_void_p, c_void_p)
        calls.dt_codec_open.restype = c_void_p
        calls.dt_codec_open.argtypes = calls.dt_codec_run.argtypes = (c_void_p, c_void_p)
        calls.dt_codec_close.argtypes = calls.dt_codec_state_size.argtypes = (c_void_p,)
        calls.dt_codec_state_size.restype = c_int64

    @property
    def path_names(self) -> list[str]:
        """The kernel paths that this processor runs, the best one first."""
        names: list[str] = []
        while (name := self.calls.dt_path_name(len(names))) is not None:
            names.append(name.decode())
        return names


class NativeContext:
    """A kernel path, its threads, and what is opened on them. One owner: a call while another one
    is under way is refused, and what is closed under a call goes when that returns."""

    def __init__(
        self, library: NativeLibrary, *, path: str | None = None, threads: int = 1
    ) -> None:
        """Raises BackendError if this processor does not run `path`; none means the best one."""
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
        """Give everything back; calls are refused from now on. Doing it twice is doing it once."""
        self._lifetime.close()

    def open(self, opening: Callable[..., int | None], closing: Any, *args: Any) -> int:
        """A decoder or a codec, which is closed with the context.

        Raises ValueError with the library's words if it refuses, UsageError as `call` does.
        """
        with self._lifetime:
            opened = opening(self.handle, *args)
            if opened is None:
                raise ValueError(self._message())
            self._opened.callback(closing, opened)
            return opened

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the library.

        Raises UsageError if the context is closed, busy, or another process's.
        """
        with self._lifetime:
            return function(*args)

    def run(self, call: str, function: Callable[..., int], *args: Any) -> None:
        """Call what returns a status.

        Raises what that means: ValueError for sizes, BackendError for values. UsageError as `call`.
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
        """x (N, heads x columns) through `heads` matrices of their own rows: (N, rows)."""
        _expect(x, np.float32, (len(x), heads * matrix.columns))
        y = np.empty((len(x), matrix.rows), np.float32)
        call, handle = self.calls.dt_linear, c_void_p(self.handle)
        self.run("linear", call, handle, byref(matrix), heads, address(x), len(x), address(y))
        return y

    def add_experts(
        self,
        record: Record,
        table: NDArray[np.uint64],
        x: NDArray[np.float32],
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
        y: NDArray[np.float32],
        *,
        num_own: int = 0,
    ) -> None:
        """y (N, C) += the experts ids (N, k), and each of the table's last `num_own` ones."""
        num_tokens, top_k = ids.shape
        for rows in (x, y):
            _expect(rows, np.float32, (num_tokens, record.width))
        _expect(ids, np.int64, (num_tokens, top_k))
        _expect(weights, np.float32, (num_tokens, top_k))
        _expect(table, np.uint64, (len(table),))
        self.run(
            "experts",
            self.calls.dt_moe,
            c_void_p(self.handle),
            byref(record),
            address(table),
            len(table) - num_own,
            num_own,
            address(x),
            num_tokens,
            address(ids),
            address(weights),
            top_k,
            address(y),
        )

    def cache_row_bytes(self, latent: int, rope: int, kind: str) -> int:
        return int(self.calls.dt_cache_row_bytes(latent, rope, CACHE_KINDS[kind]))

    def snake(self, x: NDArray[np.float32], alpha: NDArray[np.float32]) -> Any:
        """x + sin(alpha x)^2 / alpha for x (channels, samples), alpha (channels,)."""
        _expect(alpha, np.float32, (len(x),))
        _expect(x, np.float32, (len(x), x.shape[1]))
        y = np.empty_like(x)
        handle = c_void_p(self.handle)
        self.call(self.calls.dt_snake, handle, address(x), address(alpha), *x.shape, address(y))
        return y

    def read(self, array: NDArray[np.uint8]) -> None:
        """Read every byte once: the roofline of everything else."""
        size = c_int64(array.nbytes)
        self.call(self.calls.dt_read, c_void_p(self.handle), address(array), size)


def address(array: NDArray[Any] | None) -> c_void_p:
    """An array's first byte, or null."""
    return c_void_p(None if array is None else array.ctypes.data)


@cache
def _say_fewer_threads(asked: int, found: int) -> None:
    """Once, however many contexts are opened."""
    log.warning("the system refuses threads: %d of %d compute; %s", found, asked, host.MORE_THREADS)


def _expect(array: NDArray[Any], dtype: type, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(
            f"expected a dense {np.dtype(dtype)} array {shape}, found {array.dtype} {array.shape}"
        )
