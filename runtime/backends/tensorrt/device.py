"""One GPU with TensorRT: memory, streams and loaded engines, all released by `close`.

order     the checks are: CUDA's device, its compute capability, TensorRT's module and version, the
          bundle's target, the plugin. Native code parses an engine only after them, because without
          a driver `deserialize_cuda_engine` ends the process
memory    is allocated while loading, never in a step. Files are copied through two pinned buffers;
          on a Jetson, whose GPU shares the CPU's memory, they are read to their final place
"""

from __future__ import annotations

import ctypes
import logging
import zlib
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle, Machine
from deeptalk_edge.errors import ArtifactError, BackendError, EdgeError, ExpertUnavailable
from deeptalk_edge.runtime.backends.stages import GpuStages, Stage
from deeptalk_edge.runtime.backends.tensorrt.flavour import FLAVOURS, Flavour
from deeptalk_edge.runtime.backends.tensorrt.kernel_cache import KernelCache
from deeptalk_edge.runtime.backends.tensorrt.plugin import check_plugin
from deeptalk_edge.runtime.cuda import Cudart

log = logging.getLogger(__name__)

STAGING_BYTES = 64 << 20
"""Size of each of the two pinned buffers for files."""

ALIGNMENT = 256
"""Alignment of every address that TensorRT gets."""

Value = TypeVar("Value", bound=np.generic)

CheckPart: TypeAlias = Callable[[int, memoryview], None]
"""Called with every part of a file and its offset; raises if the part is damaged."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """Pinned host memory as a flat array of bytes, and its address."""

    array: NDArray[np.uint8]
    address: int

    def view(self, dtype: type[Value], shape: tuple[int, ...], offset: int = 0) -> NDArray[Value]:
        """A part of it as an array."""
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.array[offset : offset + num_bytes].view(dtype).reshape(shape)


class GpuDevice:
    """The GPU that a bundle's engines run on. One owner; not thread-safe."""

    def __init__(
        self, cuda: Cudart, flavour: Flavour, trt: Any, machine: Machine, kernels: KernelCache
    ) -> None:
        """Use `open_device` to construct one."""
        self.cuda, self.flavour, self.trt, self.machine = cuda, flavour, trt, machine
        self.log = make_log(trt)
        self._held = ExitStack()
        self._streams: list[int] = []
        self._num_users = 0
        self.stages = GpuStages()
        self.runtime: Any = trt.Runtime(self.log)
        self.kernels = kernels

    @property
    def version(self) -> str:
        return f"{self.flavour.product} {self.trt.__version__}"

    def stream(self, *, is_urgent: bool = False) -> int:
        stream = self.cuda.make_stream(is_urgent=is_urgent)
        self._held.callback(self.cuda.destroy_stream, stream)
        self._streams.append(stream)
        return stream

    def malloc(self, num_bytes: int) -> int:
        """Allocate device memory, which `close` frees.

        Raises DoesNotFit if the device has less free.
        """
        pointer = self.cuda.malloc(max(num_bytes, ALIGNMENT))
        self._held.callback(self.cuda.free, pointer)
        return pointer

    def pinned(self, num_bytes: int) -> Pinned:
        """Allocate pinned host memory, which `close` frees."""
        pointer = self.cuda.host_malloc(max(num_bytes, ALIGNMENT))
        self._held.callback(self.cuda.host_free, pointer)
        return Pinned(np.frombuffer(_memory(pointer, num_bytes), np.uint8), pointer)

    def stopwatch(self, stage: Stage, stream: int) -> Stopwatch:
        """Return a stopwatch of two events for a stage on a stream."""
        events = [self.cuda.make_event(is_timed=True) for _ in range(2)]
        for event in events:
            self._held.callback(self.cuda.destroy_event, event)
        return Stopwatch(self, stage, stream, events[0], events[1])

    def hold(self, give_back: Callable[[], None]) -> None:
        """Let `close` call `give_back`, in reverse order of these calls."""
        self._held.callback(give_back)

    def load_file(
        self,
        path: Path,
        *,
        num_bytes: int,
        check: CheckPart | None = None,
    ) -> int:
        """Load a file's first bytes into device memory; returns their address.

        Raises ArtifactError if the file is shorter, DoesNotFit if the device has not enough memory.
        """
        if path.stat().st_size < num_bytes:
            raise ArtifactError(
                f"{path}: {path.stat().st_size} bytes, its engine reads {num_bytes}; export the "
                "bundle again"
            )
        if self.cuda.is_integrated:
            memory = self.pinned(num_bytes)
            _read(path, 0, _memory(memory.address, num_bytes), check)
            return self.cuda.device_pointer(memory.address)
        pointer = self.malloc(num_bytes)
        self._stage(path, pointer, num_bytes, check)
        return pointer

    def _stage(
        self,
        path: Path,
        pointer: int,
        num_bytes: int,
        check: CheckPart | None,
    ) -> None:
        """Copy a file through two buffers: one is copied while the other is filled."""
        cuda = self.cuda
        with ExitStack() as held:
            stream = cuda.make_stream()
            held.callback(cuda.destroy_stream, stream)
            size = min(STAGING_BYTES, num_bytes)
            buffers = []
            for _ in range(2):
                address = cuda.host_malloc(size)
                held.callback(cuda.host_free, address)
                event = cuda.make_event()
                held.callback(cuda.destroy_event, event)
                cuda.record(event, stream)
                buffers.append((address, event))
            held.callback(cuda.synchronize, stream)
            for part, offset in enumerate(range(0, num_bytes, size)):
                address, event = buffers[part % 2]
                cuda.wait(event)  # the last copy from this buffer is done
                count = min(size, num_bytes - offset)
                _read(path, offset, _memory(address, count), check)
                cuda.copy_to_device(pointer + offset, address, count, stream)
                cuda.record(event, stream)

    def share(self) -> Callable[[], None]:
        """Return a function for a user of the device to call once, when done; the last call closes
        it."""
        self._num_users += 1
        return self._end_share

    def _end_share(self) -> None:
        self._num_users -= 1
        if self._num_users == 0:
            self.close()

    def close(self) -> None:
        """Release everything; the object cannot be used again.

        A failed device keeps its memory until the process ends; a line in the log says so.
        """
        try:
            with self._held:
                for stream in self._streams:  # no memory may be freed during a pass
                    self.cuda.synchronize(stream)
                self.kernels.save()  # a conversation may have compiled more than the load
        except EdgeError as error:
            log.warning("the GPU's memory is given back when the process ends: %s", error)
        self.kernels.release()
        self.runtime = None


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Two events around a stage's work."""

    device: GpuDevice
    stage: Stage
    stream: int
    first: int
    last: int

    def start(self) -> None:
        self.device.cuda.record(self.first, self.stream)

    def stop(self) -> None:
        self.device.cuda.record(self.last, self.stream)

    def read(self) -> None:
        """Add the time; call it after a wait for the stream."""
        elapsed_ms = self.device.cuda.elapsed_ms(self.first, self.last)
        self.device.stages.add(self.stage, elapsed_ms)


def open_device(bundle: Bundle, kernels: KernelCache) -> GpuDevice:
    """Open this machine's GPU with the TensorRT that a bundle needs.

    Raises BackendError if CUDA, a device, TensorRT or the plugin is missing, ArtifactError if the
    bundle is not for them.
    """
    target = bundle.manifest.target
    flavour = FLAVOURS.get(target.backend)
    if flavour is None:
        raise ArtifactError(
            f"{bundle.path}: made for the backend {target.backend}, it has no engines; export the "
            "checkpoint with --device and a GPU's profile"
        )
    cuda = Cudart()
    capability = cuda.compute_capability
    trt = flavour.load()
    machine = Machine(
        backend=target.backend, compute_capability=capability, tensorrt=str(trt.__version__)
    )
    bundle.check_machine(machine)
    device = GpuDevice(cuda, flavour, trt, machine, kernels)
    try:
        if target.plugin is not None:
            check_plugin(bundle.file(target.plugin), capability)
            if trt.get_plugin_registry().load_library(str(bundle.file(target.plugin))) is None:
                raise BackendError(
                    f"{bundle.file(target.plugin)}: {device.version} does not load this plugin "
                    f"({device.log.take_errors()}); build it again with `make plugin`"
                )
    except BaseException:
        device.close()
        raise
    return device


def check_records(bundle: Bundle) -> CheckPart:
    """Return a check of experts.bin while it is read: the CRC-32 of every record.

    The check raises ExpertUnavailable naming the expert.
    """
    records = sorted(bundle.manifest.experts.records, key=lambda record: record.offset)
    path = bundle.file(bundle.manifest.experts.file)
    state = {"next": 0, "crc": 0, "done": 0}

    def check(offset: int, part: memoryview) -> None:
        while state["next"] < len(records):
            record = records[state["next"]]
            start = record.offset + state["done"] - offset
            if start >= len(part):
                return
            piece = part[start : start + record.bytes - state["done"]]
            state["crc"] = zlib.crc32(piece, state["crc"])
            state["done"] += len(piece)
            if state["done"] < record.bytes:
                return
            if state["crc"] != record.crc32:
                raise ExpertUnavailable(
                    f"{path}: layer {record.layer}, expert {record.expert} is damaged; copy the "
                    "bundle again"
                )
            state.update(next=state["next"] + 1, crc=0, done=0)

    return check


def _read(
    path: Path,
    offset: int,
    memory: memoryview,
    check: CheckPart | None,
) -> None:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        done = 0
        while done < len(memory) and (count := file.readinto(memory[done:])):
            done += count
    if done < len(memory):
        raise ArtifactError(
            f"{path}: ends at {offset + done} bytes while it is read; copy the bundle again"
        )
    if check is not None:
        check(offset, memory)


def _memory(address: int, num_bytes: int) -> memoryview:
    """View host memory as bytes."""
    return memoryview((ctypes.c_char * num_bytes).from_address(address)).cast("B")


def make_log(trt: Any) -> Any:
    """Make a logger that writes TensorRT's messages to our log and keeps the last errors for
    exceptions."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            levels = trt.ILogger.Severity
            if severity in (levels.ERROR, levels.INTERNAL_ERROR):
                self.errors = [*self.errors[-3:], text]
                log.info("TensorRT: %s", text)
            elif severity == levels.WARNING:
                log.debug("TensorRT: %s", text)

        def take_errors(self) -> str:
            """Return TensorRT's messages since the last call."""
            said, self.errors = "; ".join(self.errors), []
            return said or "TensorRT gives no reason"

    return Log()


def aligned(num_bytes: int) -> int:
    """Round up to TensorRT's alignment."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def offsets_of(sizes: Iterable[int]) -> list[int]:
    """Offsets of arrays of these sizes in one block, and the block's size as the last value."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + aligned(size))
    return offsets
