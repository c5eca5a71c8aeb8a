"""The few calls of the CUDA runtime that paging needs, through ctypes: no build, no wheel.

`Cudart` opens the libcudart of the machine. Every call raises BackendError with CUDA's own words.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

from deeptalk_edge.errors import BackendError

_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")

_SUCCESS, _NOT_READY = 0, 600
_HOST_REGISTER_MAPPED = 2
_EVENT_DISABLE_TIMING = 2
_STREAM_NON_BLOCKING = 1
_TO_DEVICE, _FROM_DEVICE = 1, 2


class CudaRuntime(Protocol):
    """Pointers, streams and events are plain integers."""

    def malloc(self, num_bytes: int) -> int:
        """Device memory."""

    def free(self, pointer: int) -> None: ...

    def memset(self, pointer: int, value: int, num_bytes: int) -> None:
        """Fill device memory, and wait."""

    def register(self, pointer: int, num_bytes: int) -> None:
        """Pin host memory and map it for the device."""

    def unregister(self, pointer: int) -> None: ...

    def device_pointer(self, pointer: int) -> int:
        """Where the device sees registered host memory."""

    def make_stream(self) -> int: ...

    def destroy_stream(self, stream: int) -> None: ...

    def copy_to_device(self, to: int, source: int, num_bytes: int, stream: int) -> None:
        """Begin to copy registered host memory."""

    def make_event(self) -> int: ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        """The event is what the stream has been given so far."""

    def is_done(self, event: int) -> bool: ...

    def wait(self, event: int) -> None: ...


class Cudart:
    """The CUDA runtime of this machine; calls release the GIL."""

    def __init__(self) -> None:
        """Open the library.

        Raises BackendError if there is none, or no device that it can use.
        """
        for name in _NAMES:
            try:
                self._library = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise BackendError(
                f"none of {', '.join(_NAMES)} can be loaded; install the CUDA runtime, or use the "
                "CPU's pool"
            )
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._call("cudaFree", ctypes.c_void_p(None))  # makes the context, or says why not

    def malloc(self, num_bytes: int) -> int:
        return self._made("cudaMalloc", ctypes.c_size_t(num_bytes))

    def free(self, pointer: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(pointer))

    def memset(self, pointer: int, value: int, num_bytes: int) -> None:
        self._call(
            "cudaMemset",
            ctypes.c_void_p(pointer),
            ctypes.c_int(value),
            ctypes.c_size_t(num_bytes),
        )
        self._call("cudaDeviceSynchronize")

    def register(self, pointer: int, num_bytes: int) -> None:
        self._call(
            "cudaHostRegister",
            ctypes.c_void_p(pointer),
            ctypes.c_size_t(num_bytes),
            ctypes.c_uint(_HOST_REGISTER_MAPPED),
        )

    def unregister(self, pointer: int) -> None:
        self._call("cudaHostUnregister", ctypes.c_void_p(pointer))

    def device_pointer(self, pointer: int) -> int:
        return self._made("cudaHostGetDevicePointer", ctypes.c_void_p(pointer), ctypes.c_uint(0))

    def make_stream(self) -> int:
        return self._made("cudaStreamCreateWithFlags", ctypes.c_uint(_STREAM_NON_BLOCKING))

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def copy_to_device(self, to: int, source: int, num_bytes: int, stream: int) -> None:
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(num_bytes),
            ctypes.c_int(_TO_DEVICE),
            ctypes.c_void_p(stream),
        )

    def copy_from_device(self, to: int, source: int, num_bytes: int) -> None:
        """Copy to any host memory, and wait; for checks."""
        self._call(
            "cudaMemcpy",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(num_bytes),
            ctypes.c_int(_FROM_DEVICE),
        )

    def make_event(self) -> int:
        return self._made("cudaEventCreateWithFlags", ctypes.c_uint(_EVENT_DISABLE_TIMING))

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", ctypes.c_void_p(event))

    def record(self, event: int, stream: int) -> None:
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def is_done(self, event: int) -> bool:
        code = self._library.cudaEventQuery(ctypes.c_void_p(event))
        if code == _NOT_READY:
            return False
        self._check("cudaEventQuery", code)
        return True

    def wait(self, event: int) -> None:
        self._call("cudaEventSynchronize", ctypes.c_void_p(event))

    def _made(self, name: str, *args: object) -> int:
        """Call what hands out a pointer through its first argument."""
        made = ctypes.c_void_p()
        self._call(name, ctypes.byref(made), *args)
        return made.value or 0

    def _call(self, name: str, *args: object) -> None:
        self._check(name, getattr(self._library, name)(*args))

    def _check(self, name: str, code: int) -> None:
        if code != _SUCCESS:
            words = self._library.cudaGetErrorString(code).decode()
            raise BackendError(f"{name}: {words} (CUDA error {code})")


class CudaFence:
    """What a stream has been given so far; a lease ends when that is done."""

    def __init__(self, runtime: CudaRuntime, stream: int) -> None:
        self._runtime = runtime
        self._event = runtime.make_event()
        runtime.record(self._event, stream)

    def is_done(self) -> bool:
        return self._runtime.is_done(self._event)

    def wait(self) -> None:
        self._runtime.wait(self._event)

    def __del__(self) -> None:
        self._runtime.destroy_event(self._event)
