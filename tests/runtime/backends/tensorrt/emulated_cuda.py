"""A strict emulation of CUDA without a GPU: for tests, never installed, never used for figures.

It replaces libcudart itself, so `Cudart`'s code runs against it.

memory    a device pointer must be an address in a live allocation, else the call is an
          EmulatorError; unwritten memory reads as NaN
pinned    an asynchronous copy from or to other host memory is an EmulatorError: a real one would
          wait, or be refused in a capture
streams   "late": work runs only when it is waited for; "eager": at once. Code that reads too early,
          or overwrites the source of a pending copy, gets another result in one of them
graphs    hold the work and the addresses of a capture; calls that are forbidden in a capture return
          error 900, as in CUDA
faults    `fail(call, code)` has the next such call return that code
"""

from __future__ import annotations

import bisect
import ctypes
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

Mode = Literal["late", "eager"]

_WORDS = {
    1: b"invalid argument",
    2: b"out of memory",
    35: b"CUDA driver version is insufficient for CUDA runtime version",
    100: b"no CUDA-capable device is detected",
    209: b"no kernel image is available for execution on the device",
    700: b"an illegal memory access was encountered",
    900: b"operation not permitted when stream is capturing",
}


class EmulatorError(Exception):
    """An error that on a real card would be a fault, a hang or a wrong answer."""


def plain(value: Any) -> int:
    """Return the number in a ctypes argument."""
    return int(getattr(value, "value", value) or 0)


class EmulatedCuda:
    """One GPU and its libcudart."""

    def __init__(
        self,
        mode: Mode = "late",
        *,
        capability: tuple[int, int] = (8, 7),
        driver: int = 13000,
        runtime: int = 13000,
        memory_bytes: int = 1 << 34,
        is_integrated: bool = False,
    ) -> None:
        self.mode, self.capability, self.memory_bytes = mode, capability, memory_bytes
        self.driver, self.runtime, self.is_integrated = driver, runtime, is_integrated
        self.calls: Counter[str] = Counter()
        self.used_bytes = 0
        self.scratch_users: dict[int, int] = {}
        """The stream that each scratch buffer serves."""
        self._live: dict[int, tuple[int, Any]] = {}
        self._host: dict[int, tuple[int, Any]] = {}
        self._starts: dict[str, list[int]] = {"device": [], "host": []}
        self._streams: dict[int, list[Callable[[], None]]] = {}
        self.priorities: dict[int, int] = {}
        self._given: Counter[int] = Counter()
        self._done: Counter[int] = Counter()
        self._events: dict[int, tuple[int, int] | None] = {}
        self._captures: dict[int, list[Callable[[], None]]] = {}
        self._graphs: dict[int, list[Callable[[], None]]] = {}
        self._faults: dict[str, list[int]] = {}
        self._lost = 0
        self._next = 1000

    # For tests ------------------------------------------------------------------------------------

    def fail(self, call: str, code: int, *, after: int = 0, sticky: bool = False) -> None:
        """Let a later call return `code`; a sticky fault makes all calls after it fail."""
        self._faults[call] = [code, after, int(sticky)]

    @property
    def is_clean(self) -> bool:
        """Whether everything was released."""
        left = self._live, self._host, self._streams, self._events, self._graphs
        return not any(left)

    @property
    def num_pending(self) -> int:
        """Number of pieces of work that streams have not done."""
        return sum(map(len, self._streams.values()))

    def check(self, address: int, num_bytes: int, what: str) -> None:
        """Raises EmulatorError unless the bytes are in one live allocation that the device can
        access."""
        if not (
            self._lies_in("device", address, num_bytes) or self._lies_in("host", address, num_bytes)
        ):
            raise EmulatorError(f"{what}: {num_bytes} bytes at {address:#x} are in no allocation")

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        if stream in self._captures:
            self._captures[stream].append(work)
            return
        if stream not in self._streams:
            raise EmulatorError(f"no such stream: {stream}")
        self._streams[stream].append(work)
        self._given[stream] += 1
        if self.mode == "eager":
            self._run(stream)

    def is_capturing(self, stream: int) -> bool:
        return stream in self._captures

    def _lies_in(self, where: str, address: int, num_bytes: int) -> bool:
        starts = self._starts[where]
        at = bisect.bisect_right(starts, address) - 1
        if at < 0:
            return False
        start = starts[at]
        size = (self._live if where == "device" else self._host)[start][0]
        return address + num_bytes <= start + size

    def _run(self, stream: int, up_to: int | None = None) -> None:
        queue = self._streams[stream]
        while queue and (up_to is None or self._done[stream] < up_to):
            work = queue.pop(0)
            self._done[stream] += 1
            work()

    def _handle(self) -> int:
        self._next += 1
        return self._next

    def __getattr__(self, name: str) -> Any:
        """A function of libcudart: it is counted, and fails if a test says so."""
        function = getattr(type(self), f"call_{name}", None)
        if function is None and not name.startswith("cuda"):
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            self.calls[name] += 1
            if name == "cudaGetErrorString":
                return function(self, *args)  # type: ignore[misc]
            if self._lost:
                return self._lost
            if fault := self._faults.get(name):
                code, after, sticky = fault
                if after == 0:
                    del self._faults[name]
                    self._lost = code if sticky else 0
                    return code
                fault[1] -= 1
            if function is None:
                raise EmulatorError(f"the emulator has no {name}")
            return function(self, *args) or 0

        call.restype = None  # type: ignore[attr-defined]
        if name == "cudaGetErrorString":
            self.__dict__[name] = call
        return call

    # libcudart ------------------------------------------------------------------------------------

    def call_cudaGetErrorString(self, code: Any) -> bytes:
        return _WORDS.get(plain(code), b"unrecognized error code")

    def call_cudaDriverGetVersion(self, version: Any) -> None:
        version._obj.value = self.driver

    def call_cudaRuntimeGetVersion(self, version: Any) -> None:
        version._obj.value = self.runtime

    def call_cudaDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> None:
        known = {18: int(self.is_integrated), 75: self.capability[0], 76: self.capability[1]}
        value._obj.value = known[plain(attribute)]

    def call_cudaMemGetInfo(self, free: Any, total: Any) -> None:
        free._obj.value, total._obj.value = self.memory_bytes - self.used_bytes, self.memory_bytes

    def call_cudaMalloc(self, pointer: Any, size: Any) -> int:
        if self._captures:
            return 900
        num_bytes = plain(size)
        if self.used_bytes + num_bytes > self.memory_bytes:
            return 2
        pointer._obj.value = self._allocate("device", self._live, num_bytes)
        self.used_bytes += num_bytes
        return 0

    def call_cudaFree(self, pointer: Any) -> int:
        if not plain(pointer):
            return 0
        if self._captures:
            return 900
        for stream in self._streams:  # it waits for the device
            self._run(stream)
        self.used_bytes -= self._live[plain(pointer)][0]
        self.scratch_users.pop(plain(pointer), None)
        return self._release("device", self._live, plain(pointer))

    def call_cudaHostAlloc(self, pointer: Any, size: Any, flags: Any) -> int:
        assert plain(flags) == 2
        pointer._obj.value = self._allocate("host", self._host, plain(size))
        return 0

    def call_cudaFreeHost(self, pointer: Any) -> int:
        return self._release("host", self._host, plain(pointer))

    def call_cudaHostGetDevicePointer(self, pointer: Any, host: Any, flags: Any) -> None:
        if not self._lies_in("host", plain(host), 1):
            raise EmulatorError("cudaHostGetDevicePointer of memory that is not pinned")
        pointer._obj.value = plain(host)

    def _allocate(self, where: str, live: dict[int, tuple[int, Any]], num_bytes: int) -> int:
        memory = np.full(max(num_bytes, 1) + 256, 0xFF, np.uint8)
        address = memory.ctypes.data + (-memory.ctypes.data % 256)
        live[address] = (num_bytes, memory)
        bisect.insort(self._starts[where], address)
        return address

    def _release(self, where: str, live: dict[int, tuple[int, Any]], address: int) -> int:
        if address not in live:
            raise EmulatorError(f"{where} memory at {address:#x} is freed, and not allocated")
        del live[address]
        self._starts[where].remove(address)
        return 0

    def call_cudaMemsetAsync(self, to: Any, value: Any, size: Any, stream: Any) -> None:
        place, num_bytes, byte = plain(to), plain(size), plain(value)
        self.check(place, num_bytes, "cudaMemsetAsync")

        def fill() -> None:
            ctypes.memset(place, byte, num_bytes)

        self.enqueue(plain(stream), fill)

    def call_cudaMemcpyAsync(self, to: Any, source: Any, size: Any, kind: Any, stream: Any) -> None:
        target, origin, num_bytes = plain(to), plain(source), plain(size)
        ends = {1: ("device", "host"), 2: ("host", "device"), 3: ("device", "device")}
        for where, address in zip(ends[plain(kind)], (target, origin), strict=True):
            if not self._lies_in(where, address, num_bytes):
                raise EmulatorError(
                    f"cudaMemcpyAsync: {num_bytes} bytes at {address:#x} are in no {where} memory"
                )

        def copy() -> None:
            self.check(target, num_bytes, "a copy's target, when it ran")
            self.check(origin, num_bytes, "a copy's source, when it ran")
            ctypes.memmove(target, origin, num_bytes)

        self.enqueue(plain(stream), copy)

    def call_cudaMemcpy2DAsync(
        self,
        to: Any,
        to_pitch: Any,
        source: Any,
        pitch: Any,
        width: Any,
        height: Any,
        kind: Any,
        stream: Any,
    ) -> int:
        target, origin = plain(to), plain(source)
        steps, row_bytes, rows = (plain(to_pitch), plain(pitch)), plain(width), plain(height)
        assert plain(kind) == 3
        if row_bytes > min(steps):
            return 12  # cudaErrorInvalidPitchValue
        if rows and row_bytes:
            self.check(target, (rows - 1) * steps[0] + row_bytes, "cudaMemcpy2DAsync, target")
            self.check(origin, (rows - 1) * steps[1] + row_bytes, "cudaMemcpy2DAsync, source")

        def copy() -> None:
            for row in range(rows):
                ctypes.memmove(target + row * steps[0], origin + row * steps[1], row_bytes)

        self.enqueue(plain(stream), copy)
        return 0

    def call_cudaDeviceGetStreamPriorityRange(self, least: Any, greatest: Any) -> None:
        least._obj.value, greatest._obj.value = 0, -5

    def call_cudaStreamCreateWithPriority(self, stream: Any, flags: Any, priority: Any) -> None:
        assert plain(flags) == 1
        stream._obj.value = self._handle()
        self._streams[stream._obj.value] = []
        self.priorities[stream._obj.value] = plain(priority)

    def call_cudaStreamDestroy(self, stream: Any) -> None:
        del self._streams[plain(stream)]

    def call_cudaStreamSynchronize(self, stream: Any) -> int:
        if plain(stream) in self._captures:
            return 900
        self._run(plain(stream))
        return 0

    def call_cudaEventCreateWithFlags(self, event: Any, flags: Any) -> None:
        event._obj.value = self._handle()
        self._events[event._obj.value] = None

    def call_cudaEventDestroy(self, event: Any) -> None:
        del self._events[plain(event)]

    def call_cudaEventRecord(self, event: Any, stream: Any) -> None:
        if plain(stream) in self._captures:
            raise EmulatorError("an event that is recorded in a capture cannot be waited for")
        self._events[plain(event)] = (plain(stream), self._given[plain(stream)])

    def call_cudaEventSynchronize(self, event: Any) -> None:
        if seen := self._events[plain(event)]:
            self._run(*seen)

    def call_cudaEventQuery(self, event: Any) -> int:
        seen = self._events[plain(event)]
        return 0 if not seen or self._done[seen[0]] >= seen[1] else 600

    def call_cudaEventElapsedTime(self, value: Any, start: Any, end: Any) -> int:
        for event in (start, end):
            seen = self._events[plain(event)]
            if seen is None or self._done[seen[0]] < seen[1]:
                return 600
        value._obj.value = 0.0  # the emulator measures no time
        return 0

    def call_cudaStreamBeginCapture(self, stream: Any, mode: Any) -> None:
        assert plain(mode) == 1
        self._captures[plain(stream)] = []

    def call_cudaStreamEndCapture(self, stream: Any, graph: Any) -> None:
        graph._obj.value = self._handle()
        self._graphs[graph._obj.value] = self._captures.pop(plain(stream))

    def call_cudaGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> None:
        executable._obj.value = self._handle()
        self._graphs[executable._obj.value] = self._graphs[plain(graph)]

    def call_cudaGraphDestroy(self, graph: Any) -> None:
        del self._graphs[plain(graph)]

    def call_cudaGraphExecDestroy(self, graph: Any) -> None:
        del self._graphs[plain(graph)]

    def call_cudaGraphLaunch(self, graph: Any, stream: Any) -> None:
        for work in self._graphs[plain(graph)]:
            self.enqueue(plain(stream), work)


_current: EmulatedCuda | None = None


def use(cuda: EmulatedCuda | None) -> None:
    """Make this the GPU of the emulated TensorRT."""
    global _current
    _current = cuda


def current() -> EmulatedCuda:
    if _current is None:
        raise EmulatorError("no GPU: a real TensorRT would end the process here")
    return _current
