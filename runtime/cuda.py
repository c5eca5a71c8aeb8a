"""The CUDA runtime calls that we need, through ctypes, without a compiler or a wheel.

open      libcudart 13 or 12, the newest that the driver supports
errors    every return code but success raises with the call's name and CUDA's message: DoesNotFit
          if memory is short, BackendError for everything else
handles   pointers, streams, events and graphs are plain integers
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

from deeptalk_edge.errors import BackendError, DoesNotFit

_NAMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")

_SUCCESS, _OUT_OF_MEMORY, _NOT_READY = 0, 2, 600
_HOST_MAPPED = 2  # cudaHostAllocMapped and cudaHostRegisterMapped
_EVENT_DISABLE_TIMING = 2
_STREAM_NON_BLOCKING = 1
_TO_DEVICE, _FROM_DEVICE, _ON_DEVICE = 1, 2, 3
_CAPTURE_THREAD_LOCAL = 1  # so that other threads' calls do not break a capture
_INTEGRATED, _MAJOR, _MINOR = 18, 75, 76  # cudaDeviceAttr


class CudaRuntime(Protocol):
    """The calls that pools of experts need."""

    def malloc(self, num_bytes: int) -> int:
        """Device memory."""

    def free(self, pointer: int) -> None: ...

    def memset(self, pointer: int, value: int, num_bytes: int) -> None:
        """Fill device memory and wait."""

    def register(self, pointer: int, num_bytes: int) -> None:
        """Pin host memory and map it for the device."""

    def unregister(self, pointer: int) -> None: ...

    def device_pointer(self, pointer: int) -> int:
        """Address of registered host memory on the device."""

    def make_stream(self) -> int: ...

    def destroy_stream(self, stream: int) -> None: ...

    def copy_to_device(self, to: int, source: int, num_bytes: int, stream: int) -> None:
        """Begin to copy registered host memory."""

    def make_event(self) -> int: ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        """Record the work of the stream so far in the event."""

    def is_done(self, event: int) -> bool: ...

    def wait(self, event: int) -> None: ...


class Cudart:
    """The CUDA runtime of this machine; calls release the GIL."""

    def __init__(self) -> None:
        """Open the library and the first device.

        Raises BackendError if there is no library, no driver, none that is new enough, or no
        device that it can use.
        """
        self._library = _open_library()
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._call("cudaFree", ctypes.c_void_p(None))  # makes the context or raises

    # Device ---------------------------------------------------------------------------------------

    @property
    def compute_capability(self) -> str:
        """In the form of compilers: `sm_89`."""
        return f"sm_{self._attribute(_MAJOR)}{self._attribute(_MINOR)}"

    @property
    def is_integrated(self) -> bool:
        """Whether CPU and GPU share one memory, as on a Jetson."""
        return bool(self._attribute(_INTEGRATED))

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), 0)
        return value.value

    # Memory ---------------------------------------------------------------------------------------

    def malloc(self, num_bytes: int) -> int:
        """Device memory, aligned to 256 bytes.

        Raises DoesNotFit if the device has less free.
        """
        try:
            return self._made("cudaMalloc", ctypes.c_size_t(num_bytes))
        except DoesNotFit as error:
            free, total = self._memory()
            raise DoesNotFit(
                f"{error}: {num_bytes / 1e6:.1f} MB asked for, {free / 1e6:.1f} of "
                f"{total / 1e6:.1f} MB are free; end what else uses the GPU, or export with fewer "
                "context rows or smaller weights"
            ) from None

    def free(self, pointer: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(pointer))

    def host_malloc(self, num_bytes: int) -> int:
        """Pinned host memory that the device can access (`device_pointer`)."""
        return self._made("cudaHostAlloc", ctypes.c_size_t(num_bytes), ctypes.c_uint(_HOST_MAPPED))

    def host_free(self, pointer: int) -> None:
        self._call("cudaFreeHost", ctypes.c_void_p(pointer))

    def register(self, pointer: int, num_bytes: int) -> None:
        self._call(
            "cudaHostRegister",
            ctypes.c_void_p(pointer),
            ctypes.c_size_t(num_bytes),
            ctypes.c_uint(_HOST_MAPPED),
        )

    def unregister(self, pointer: int) -> None:
        self._call("cudaHostUnregister", ctypes.c_void_p(pointer))

    def device_pointer(self, pointer: int) -> int:
        return self._made("cudaHostGetDevicePointer", ctypes.c_void_p(pointer), ctypes.c_uint(0))

    def memset(self, pointer: int, value: int, num_bytes: int) -> None:
        """Fill device memory and wait."""
        self._call(
            "cudaMemset",
            ctypes.c_void_p(pointer),
            ctypes.c_int(value),
            ctypes.c_size_t(num_bytes),
        )
        self._call("cudaDeviceSynchronize")

    def begin_memset(self, pointer: int, value: int, num_bytes: int, stream: int) -> None:
        """Begin to fill device memory on a stream."""
        self._call(
            "cudaMemsetAsync",
            ctypes.c_void_p(pointer),
            ctypes.c_int(value),
            ctypes.c_size_t(num_bytes),
            ctypes.c_void_p(stream),
        )

    # Copies ---------------------------------------------------------------------------------------

    def copy_to_device(self, to: int, source: int, num_bytes: int, stream: int) -> None:
        """Begin to copy pinned host memory."""
        self._copy(to, source, num_bytes, _TO_DEVICE, stream)

    def copy_to_host(self, to: int, source: int, num_bytes: int, stream: int) -> None:
        """Begin to copy to pinned host memory."""
        self._copy(to, source, num_bytes, _FROM_DEVICE, stream)

    def copy_on_device(self, to: int, source: int, num_bytes: int, stream: int) -> None:
        """Begin to copy from device memory to device memory."""
        self._copy(to, source, num_bytes, _ON_DEVICE, stream)

    def copy_rows(
        self,
        to: int,
        to_pitch: int,
        source: int,
        source_pitch: int,
        *,
        row_bytes: int,
        num_rows: int,
        stream: int,
    ) -> None:
        """Begin to copy rows on the device; a pitch is the distance between two rows, in bytes."""
        self._call(
            "cudaMemcpy2DAsync",
            ctypes.c_void_p(to),
            ctypes.c_size_t(to_pitch),
            ctypes.c_void_p(source),
            ctypes.c_size_t(source_pitch),
            ctypes.c_size_t(row_bytes),
            ctypes.c_size_t(num_rows),
            ctypes.c_int(_ON_DEVICE),
            ctypes.c_void_p(stream),
        )

    def copy_from_device(self, to: int, source: int, num_bytes: int) -> None:
        """Copy to any host memory and wait; for checks."""
        self._call(
            "cudaMemcpy",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(num_bytes),
            ctypes.c_int(_FROM_DEVICE),
        )

    def _copy(self, to: int, source: int, num_bytes: int, kind: int, stream: int) -> None:
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(num_bytes),
            ctypes.c_int(kind),
            ctypes.c_void_p(stream),
        )

    # Streams and events ---------------------------------------------------------------------------

    def make_stream(self, *, is_urgent: bool = False) -> int:
        """A stream; an urgent stream has the highest priority."""
        least, greatest = ctypes.c_int(), ctypes.c_int()
        self._call("cudaDeviceGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
        return self._made(
            "cudaStreamCreateWithPriority",
            ctypes.c_uint(_STREAM_NON_BLOCKING),
            ctypes.c_int(greatest.value if is_urgent else least.value),
        )

    def destroy_stream(self, stream: int) -> None:
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def synchronize(self, stream: int) -> None:
        """Wait until the stream has done all its work."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def make_event(self, *, is_timed: bool = False) -> int:
        flags = 0 if is_timed else _EVENT_DISABLE_TIMING
        return self._made("cudaEventCreateWithFlags", ctypes.c_uint(flags))

    def destroy_event(self, event: int) -> None:
        self._call("cudaEventDestroy", ctypes.c_void_p(event))

    def record(self, event: int, stream: int) -> None:
        """Record the work of the stream so far in the event."""
        self._call("cudaEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def is_done(self, event: int) -> bool:
        code = self._library.cudaEventQuery(ctypes.c_void_p(event))
        if code == _NOT_READY:
            return False
        self._check("cudaEventQuery", code)
        return True

    def wait(self, event: int) -> None:
        self._call("cudaEventSynchronize", ctypes.c_void_p(event))

    def elapsed_ms(self, start: int, end: int) -> float:
        """Time between two timed events that are done."""
        value = ctypes.c_float()
        self._call(
            "cudaEventElapsedTime",
            ctypes.byref(value),
            ctypes.c_void_p(start),
            ctypes.c_void_p(end),
        )
        return value.value

    # Graphs ---------------------------------------------------------------------------------------

    def begin_capture(self, stream: int) -> None:
        """Record the stream's work until `end_capture` without running it."""
        self._call(
            "cudaStreamBeginCapture", ctypes.c_void_p(stream), ctypes.c_int(_CAPTURE_THREAD_LOCAL)
        )

    def end_capture(self, stream: int) -> int:
        """Return the recorded graph, ready to launch."""
        graph = self._made_last("cudaStreamEndCapture", ctypes.c_void_p(stream))
        try:
            return self._made(
                "cudaGraphInstantiateWithFlags", ctypes.c_void_p(graph), ctypes.c_ulonglong(0)
            )
        finally:
            self._call("cudaGraphDestroy", ctypes.c_void_p(graph))

    def launch(self, graph: int, stream: int) -> None:
        self._call("cudaGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def destroy_graph(self, graph: int) -> None:
        self._call("cudaGraphExecDestroy", ctypes.c_void_p(graph))

    # ----------------------------------------------------------------------------------------------

    def _memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def _made(self, name: str, *args: object) -> int:
        """Call a function that returns a handle through its first argument."""
        made = ctypes.c_void_p()
        self._call(name, ctypes.byref(made), *args)
        return made.value or 0

    def _made_last(self, name: str, *args: object) -> int:
        """Call a function that returns a handle through its last argument."""
        made = ctypes.c_void_p()
        self._call(name, *args, ctypes.byref(made))
        return made.value or 0

    def _call(self, name: str, *args: object) -> None:
        self._check(name, getattr(self._library, name)(*args))

    def _check(self, name: str, code: int) -> None:
        if code == _SUCCESS:
            return
        words = self._library.cudaGetErrorString(code).decode()
        kind = DoesNotFit if code == _OUT_OF_MEMORY else BackendError
        raise kind(f"{name}: {words} (CUDA error {code})")


class CudaFence:
    """Done when a stream has done its work so far; a lease ends then."""

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


def _open_library() -> Any:
    """Load the newest installed libcudart that the driver supports.

    Raises BackendError if there is none.
    """
    too_new: list[str] = []
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        driver, runtime = (
            _version(library, call) for call in ("cudaDriverGetVersion", "cudaRuntimeGetVersion")
        )
        if driver == 0:
            raise BackendError(
                f"{name}: no NVIDIA driver is loaded on this machine; install one, or export the "
                "checkpoint with --device cpu-int8 and talk to that bundle"
            )
        if driver // 1000 >= runtime // 1000:  # a driver supports all runtimes of its major version
            return library
        too_new.append(
            f"{name} is CUDA {_shown(runtime)}, the driver supports up to {_shown(driver)}"
        )
    if too_new:
        raise BackendError(
            f"{'; '.join(too_new)}: update the NVIDIA driver, or install an older CUDA runtime"
        )
    raise BackendError(
        f"none of {', '.join(_NAMES)} can be loaded; install the CUDA runtime, or use the CPU's "
        "pool"
    )


def _version(library: Any, call: str) -> int:
    """1000 * major + 10 * minor; 0 where there is no driver."""
    version = ctypes.c_int()
    code = getattr(library, call)(ctypes.byref(version))
    return 0 if code else version.value


def _shown(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
