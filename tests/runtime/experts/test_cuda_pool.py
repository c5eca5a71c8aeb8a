"""The GPU pools keep the pager's guarantees on a CUDA that runs all work as late as possible.

`make gpu-check` tests a real GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import count
from pathlib import Path
from random import Random

import pytest

from deeptalk_edge.bench.gpu import cuda_check
from deeptalk_edge.errors import BackendError, ExpertUnavailable
from deeptalk_edge.runtime import cuda
from deeptalk_edge.runtime.cuda import CudaFence, Cudart
from deeptalk_edge.runtime.experts.cuda_pool import CopiedPool, MappedPool
from deeptalk_edge.runtime.experts.pager import ExpertPager
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import Lru
from deeptalk_edge.runtime.experts.pool import Pool
from deeptalk_edge.runtime.experts.record_file import PAGE_BYTES, RecordFile
from tests.runtime.experts.records import (
    NUM_EXPERTS,
    NUM_RECORDS,
    RECORD_BYTES,
    SLOT_BYTES,
    FaultyFile,
    content_of,
    write_records,
)

_OFFSET = 1 << 48  # mapped memory has another address on this device


class LazyCuda:
    """Copies only when they are waited for; knows what is not released."""

    def __init__(self) -> None:
        self.memory: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.pinned: dict[int, int] = {}
        self.pending: dict[int, list[Callable[[], None]]] = {}
        self.events: dict[int, list[Callable[[], None]]] = {}
        self.num_copies = 0
        self.fails = False
        self._handles = count(1)

    def malloc(self, num_bytes: int) -> int:
        block = ctypes.create_string_buffer(num_bytes)
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, pointer: int) -> None:
        del self.memory[pointer]

    def memset(self, pointer: int, value: int, num_bytes: int) -> None:
        ctypes.memset(pointer, value, num_bytes)

    def register(self, pointer: int, num_bytes: int) -> None:
        assert pointer % PAGE_BYTES == 0
        self.pinned[pointer] = num_bytes

    def unregister(self, pointer: int) -> None:
        del self.pinned[pointer]

    def device_pointer(self, pointer: int) -> int:
        assert pointer in self.pinned
        return pointer + _OFFSET

    def make_stream(self) -> int:
        stream = next(self._handles)
        self.pending[stream] = []
        return stream

    def destroy_stream(self, stream: int) -> None:
        del self.pending[stream]

    def copy_to_device(self, to: int, source: int, num_bytes: int, stream: int) -> None:
        if self.fails:
            raise BackendError("cudaMemcpyAsync: the device is lost")
        assert any(p <= source < p + size for p, size in self.pinned.items())
        self.num_copies += 1

        def copy() -> None:
            ctypes.memmove(to, source, num_bytes)

        self.pending[stream].append(copy)

    def make_event(self) -> int:
        event = next(self._handles)
        self.events[event] = []
        return event

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def record(self, event: int, stream: int) -> None:
        self.events[event], self.pending[stream] = self.pending[stream], []

    def is_done(self, event: int) -> bool:
        return not self.events[event]

    def wait(self, event: int) -> None:
        for work in self.events[event]:
            work()
        self.events[event] = []

    @property
    def is_clean(self) -> bool:
        return not (self.memory or self.pinned or self.pending or self.events)


def mapped(cuda: LazyCuda) -> Pool:
    return MappedPool(cuda, num_slots=5, slot_bytes=SLOT_BYTES)


def staged(cuda: LazyCuda) -> Pool:
    return CopiedPool(cuda, num_slots=5, slot_bytes=SLOT_BYTES)


def mirrored(cuda: LazyCuda) -> Pool:
    return CopiedPool(cuda, num_slots=5, slot_bytes=SLOT_BYTES, num_mirrored=NUM_RECORDS)


def open_pager(path: Path, pool: Pool) -> tuple[ExpertPager, FaultyFile]:
    records = write_records(path)
    file = FaultyFile(RecordFile(path), lambda offset, buffer: None)
    settings = PagerSettings(chunk_bytes=PAGE_BYTES, poison=True)
    return ExpertPager(records, file, pool, Lru(NUM_RECORDS), settings), file


@pytest.mark.parametrize("make", [mapped, staged, mirrored])
def test_kernels_read_the_right_bytes_and_close_frees_everything(
    tmp_path: Path, make: Callable[[LazyCuda], Pool]
) -> None:
    cuda, random = LazyCuda(), Random(2)
    pager, file = open_pager(tmp_path / "experts.bin", make(cuda))
    offset = _OFFSET if make is mapped else 0
    with pager:
        for _ in range(80):
            layer = random.randrange(1, 5)
            with pager.acquire(layer, random.sample(range(NUM_EXPERTS), 2)) as lease:
                for expert in lease.experts:
                    found = ctypes.string_at(lease.address(expert) - offset, RECORD_BYTES)
                    assert found == content_of((layer - 1) * NUM_EXPERTS + expert)
        assert pager.report()["misses"] > NUM_RECORDS
        if make is mirrored:  # the disk is read once; later loads are copies
            assert file.num_reads <= NUM_RECORDS * 3
            assert cuda.num_copies == pager.report()["misses"]
        if make is staged:
            assert len(cuda.pinned) <= 5
    assert cuda.is_clean


def test_a_copy_that_fails_names_the_expert_and_leaves_no_lease(tmp_path: Path) -> None:
    cuda = LazyCuda()
    pager, _ = open_pager(tmp_path / "experts.bin", staged(cuda))
    with pager:
        cuda.fails = True
        with pytest.raises(ExpertUnavailable, match=r"layer 1, expert 0: cudaMemcpyAsync: the dev"):
            pager.acquire(1, [0])
        assert pager.num_leased == 0
        cuda.fails = False
        pager.acquire(1, [0]).release()
    assert cuda.is_clean


def test_a_lease_lasts_until_the_stream_has_done_its_work(tmp_path: Path) -> None:
    cuda = LazyCuda()
    pager, _ = open_pager(tmp_path / "experts.bin", staged(cuda))
    with pager:
        kernels = cuda.make_stream()
        ran: list[int] = []
        cuda.pending[kernels].append(lambda: ran.append(1))
        lease = pager.acquire(1, [0, 1, 2])
        lease.release(CudaFence(cuda, kernels))
        assert pager.num_leased == 3
        pager.acquire(2, [0, 1, 2]).release()  # needs the slots, so it waits for the kernels
        assert ran == [1]
        assert pager.num_leased == 0
        cuda.destroy_stream(kernels)


def test_a_machine_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(BackendError, match=r"none of libcudart\.so\.13.*use the CPU's pool"):
        Cudart()


def test_the_gpu_check_without_cuda_says_that_nothing_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "_NAMES", ("libcudart.so.none",))
    with pytest.raises(SystemExit, match=r"none of .* the expert pools have not run$"):
        cuda_check.main()
