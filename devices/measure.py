"""What this machine does in a second, measured: memory, products, disk, timer, link to a GPU.

Each measurement takes a few tenths of a second, and its figure is the best of several turns: what
others do on the machine can only slow a turn down. What cannot be measured is a missing reading.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.devices.reading import Reading
from deeptalk_edge.errors import ArtifactError, BackendError, DoesNotFit
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.record_file import PAGE_BYTES, RecordFile

_TURNS = 5
_READ_BYTES = 128 << 20
_ROWS, _COLUMNS, _TOKENS = 2048, 2048, 64
_DISK_READS = 24
_SLOTS = 16  # 71 MB of the official size's records
_CHANNELS, _SAMPLES = 128, 1024
_COPY_BYTES = 128 << 20


def memory_read_gb_per_s(threads: int, num_bytes: int = _READ_BYTES) -> Reading[float]:
    """What `threads` threads of our kernels read from memory that no cache holds."""
    from deeptalk_edge.runtime.backends.cpu.huge_pages import huge_array

    context = _context(threads)
    if context.value is None:
        return Reading(None, context.why)
    kernels = context.value
    memory = huge_array(num_bytes)
    memory[:] = 1
    try:
        best_s = best_of(lambda: kernels.read(memory))
    finally:
        kernels.close()
    return Reading(num_bytes / best_s / 1e9)


def int8_tops(threads: int) -> Reading[float]:
    """Products of our int8 kernel on 64 rows of 2048, in 10^12 operations a second."""
    from deeptalk_edge.runtime.backends.cpu.library import Matrix, span

    context = _context(threads)
    if context.value is None:
        return Reading(None, context.why)
    kernels = context.value
    weights = np.ones((_ROWS, _COLUMNS), np.int8)
    scales = np.full(_ROWS, 0.01, np.float32)
    x = np.ones((_TOKENS, _COLUMNS), np.float32)
    matrix = Matrix(span(weights), span(scales), _ROWS, _COLUMNS, 0)
    try:
        best_s = best_of(lambda: kernels.linear(matrix, x))
    except (ValueError, BackendError) as error:
        return Reading(None, f"our kernels refuse: {error}")
    finally:
        kernels.close()
    return Reading(2.0 * _ROWS * _COLUMNS * _TOKENS / best_s / 1e12)


def float32_tflops(size: int = 768) -> Reading[float]:
    """Float products of numpy's BLAS, on the threads that it chooses; ONNX Runtime's encoder is
    near it."""
    a = np.ones((size, size), np.float32)
    best_s = best_of(lambda: a @ a)
    return Reading(2.0 * size**3 / best_s / 1e12)


def activations_g_per_s() -> Reading[float]:
    """Snake activations of our codec kernels on one thread, 10^9 a second, from a cache."""
    context = _context(1)
    if context.value is None:
        return Reading(None, context.why)
    kernels = context.value
    x, alpha = np.ones((_CHANNELS, _SAMPLES), np.float32), np.ones(_CHANNELS, np.float32)
    try:
        best_s = best_of(lambda: kernels.snake(x, alpha))
    finally:
        kernels.close()
    return Reading(x.size / best_s / 1e9)


def disk_read_gb_per_s(
    folder: Path, record_bytes: int, depths: Sequence[int] = (1, 2, 3, 4), records: int = 32
) -> dict[int, Reading[float]]:
    """By number of reads under way: records at random places of a file, past the page cache."""
    path = None
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-", delete=False) as file:
            path = Path(file.name)
            block = np.random.default_rng(0).integers(0, 256, record_bytes, np.uint8).tobytes()
            for _ in range(records):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        reads = DiskReads(path, record_bytes)
    except (OSError, ArtifactError, DoesNotFit) as error:
        if path is not None:
            path.unlink(missing_ok=True)
        return dict.fromkeys(depths, Reading(None, f"{folder}: {error}"))
    try:
        if reads.why_buffered is not None:
            why = f"{folder}: {reads.why_buffered}; a rate of the page cache says nothing"
            return dict.fromkeys(depths, Reading(None, why))
        return {depth: _disk_rate(reads, depth) for depth in depths}
    finally:
        reads.close()
        path.unlink(missing_ok=True)


def why_no_direct_reads(folder: Path) -> str | None:
    """Why files of a folder are read through the page cache; None if they are not."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as file:
            file.write(bytes(16 * PAGE_BYTES))
            file.flush()
            os.fsync(file.fileno())
            source = RecordFile(Path(file.name))
            source.close()
            return source.why_buffered
    except (OSError, ArtifactError) as error:
        return f"{folder}: {error}"


class DiskReads:
    """Reads records as the expert pager does: cut into its chunks, so many of them under way all
    the time, into memory on huge pages. Small pages halve the rate of some disks, which take a
    request for every few of them."""

    def __init__(self, path: Path, record_bytes: int) -> None:
        """The file holds records of whole pages, one after the other.

        Raises ArtifactError if it cannot be read, DoesNotFit if memory is too little.
        """
        from deeptalk_edge.runtime.backends.cpu.huge_pages import huge_array

        self._source, self._record_bytes = RecordFile(path), record_bytes
        self.why_buffered = self._source.why_buffered
        self._slots = huge_array(_SLOTS * record_bytes)
        self._slots[:] = 1
        self._random = np.random.default_rng(0)
        self._readers: dict[int, ThreadPoolExecutor] = {}  # by depth; they sleep between, as there

    def gb_per_s(self, depth: int, num_records: int) -> float:
        """Of so many records at random places. Raises OSError if one cannot be read."""
        size, chunk = self._record_bytes, PagerSettings().chunk_bytes
        places = self._random.integers(0, self._source.size_bytes // size, num_records)
        chunks = [
            (i % _SLOTS * size + start, int(place) * size + start, min(chunk, size - start))
            for i, place in enumerate(places)
            for start in range(0, size, chunk)
        ]
        if (readers := self._readers.get(depth)) is None:
            readers = self._readers[depth] = ThreadPoolExecutor(depth)
            list(readers.map(self._read, chunks[:depth]))  # starts the threads
        start_s = time.perf_counter()
        list(readers.map(self._read, chunks))
        return num_records * size / (time.perf_counter() - start_s) / 1e9

    def close(self) -> None:
        for readers in self._readers.values():
            readers.shutdown()
        self._source.close()

    def _read(self, chunk: tuple[int, int, int]) -> None:
        place, offset, num_bytes = chunk
        buffer = memoryview(self._slots.data)[place : place + num_bytes]
        if self._source.read_into(offset, buffer) != num_bytes:
            raise OSError(errno.EIO, "a read came back short")


def _disk_rate(reads: DiskReads, depth: int) -> Reading[float]:
    try:
        return Reading(reads.gb_per_s(depth, _DISK_READS))
    except OSError as error:
        return Reading(None, f"disk: {error.strerror}")


def aligned(num_bytes: int) -> NDArray[np.uint8]:
    """An array that begins on a page, as direct reads want it."""
    memory = np.empty(num_bytes + PAGE_BYTES, np.uint8)
    start = -memory.ctypes.data % PAGE_BYTES
    return memory[start : start + num_bytes]


def timer_us(sleeps: int = 20) -> dict[str, Reading[float]]:
    """The clock's smallest step, and how late a sleep of 1 ms wakes, in the median and at worst."""
    steps = []
    for _ in range(100):
        start_ns = time.perf_counter_ns()
        while (now_ns := time.perf_counter_ns()) == start_ns:
            pass
        steps.append(now_ns - start_ns)
    late = []
    for _ in range(sleeps):
        start_s = time.perf_counter()
        time.sleep(0.001)
        late.append((time.perf_counter() - start_s) * 1e6 - 1000)
    return {
        "clock_step_us": Reading(min(steps) / 1000),
        "sleep_late_us_p50": Reading(float(np.median(late))),
        "sleep_late_us_max": Reading(max(late)),
    }


def host_link_gb_per_s(num_bytes: int = _COPY_BYTES) -> Reading[float]:
    """Pinned host memory to a CUDA device, through our own binding."""
    from deeptalk_edge.runtime.cuda import Cudart

    try:
        cuda = Cudart()
        memory = aligned(num_bytes)
        cuda.register(memory.ctypes.data, num_bytes)
        device, stream, event = cuda.malloc(num_bytes), cuda.make_stream(), cuda.make_event()
    except BackendError as error:
        return Reading(None, f"CUDA: {error}")

    def copy() -> None:
        cuda.copy_to_device(device, memory.ctypes.data, num_bytes, stream)
        cuda.record(event, stream)
        cuda.wait(event)

    try:
        return Reading(num_bytes / best_of(copy) / 1e9)
    except BackendError as error:
        return Reading(None, f"CUDA: {error}")
    finally:
        with suppress(BackendError):
            cuda.free(device)
            cuda.unregister(memory.ctypes.data)


def best_of(work: Callable[[], Any], turns: int = _TURNS) -> float:
    """Seconds of the fastest turn, after one that is not counted."""
    work()
    best_s = float("inf")
    for _ in range(turns):
        start_s = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - start_s)
    return best_s


def _context(threads: int) -> Reading[Any]:
    from deeptalk_edge.runtime.backends.cpu.library import CpuContext, CpuLibrary

    try:
        return Reading(CpuContext(CpuLibrary(), threads=threads))
    except BackendError as error:
        return Reading(None, f"our kernels: {error}")
