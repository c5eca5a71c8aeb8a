"""The GPU pools on a real GPU: the first half of `make gpu-check`.

It writes a file of experts, pages them through each pool, reads every leased slot back from the
device and compares it with the file. It prints one line per pool and exits with 1 if a byte is
wrong or there is no GPU.
"""

from __future__ import annotations

import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.errors import BackendError
from deeptalk_edge.runtime.cuda import CudaFence, Cudart
from deeptalk_edge.runtime.experts.cuda_pool import CopiedPool, MappedPool
from deeptalk_edge.runtime.experts.pager import ExpertPager
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import Lru
from deeptalk_edge.runtime.experts.pool import Pool
from deeptalk_edge.runtime.experts.record_file import RecordFile

NUM_LAYERS, NUM_EXPERTS, NUM_SLOTS, RECORD_BYTES = 4, 16, 20, 4_595_712
NUM_RECORDS = NUM_LAYERS * NUM_EXPERTS


def main() -> int:
    """Check every pool; returns the exit code."""
    try:
        cuda = Cudart()
    except BackendError as error:
        sys.exit(f"gpu-check: {error}; the expert pools have not run")
    pools = gpu_pools(cuda, num_slots=NUM_SLOTS, slot_bytes=RECORD_BYTES, num_records=NUM_RECORDS)
    num_wrong = 0
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "experts.bin"
        records = write(path)
        content = np.fromfile(path, np.uint8).reshape(NUM_RECORDS, RECORD_BYTES)
        for name, make in pools.items():
            file = RecordFile(path)
            with ExpertPager(
                records, file, make(), Lru(NUM_RECORDS), PagerSettings(poison=True)
            ) as pager:
                wrong, misses, miss_ms = walk(cuda, pager, content)
                num_wrong += wrong
                print(
                    f"{name:10}{wrong} wrong of 400 leases, {misses} misses, {miss_ms:.2f} ms each "
                    f"({RECORD_BYTES / miss_ms / 1e6:.1f} GB/s), "
                    f"{'direct' if file.is_direct else file.why_buffered}"
                )
    return 1 if num_wrong else 0


def gpu_pools(
    cuda: Cudart, *, num_slots: int, slot_bytes: int, num_records: int
) -> dict[str, Callable[[], Pool]]:
    """Return constructors of each kind of pool that the GPU supports, by name."""
    size = {"num_slots": num_slots, "slot_bytes": slot_bytes}
    return {
        "mapped": lambda: MappedPool(cuda, **size),
        "staged": lambda: CopiedPool(cuda, **size),
        "mirrored": lambda: CopiedPool(cuda, **size, num_mirrored=num_records),
    }


def write(path: Path) -> list[ExpertRecord]:
    """Write random experts."""
    random = np.random.default_rng(0)
    records = []
    with path.open("wb") as file:
        for number in range(NUM_RECORDS):
            body = random.bytes(RECORD_BYTES)
            file.write(body)
            records.append(
                ExpertRecord(
                    layer=number // NUM_EXPERTS,
                    expert=number % NUM_EXPERTS,
                    offset=number * RECORD_BYTES,
                    bytes=RECORD_BYTES,
                    crc32=zlib.crc32(body),
                )
            )
    return records


def walk(cuda: Cudart, pager: ExpertPager, content: NDArray[np.uint8]) -> tuple[int, int, float]:
    """Lease at random, read back and release after a fence; returns the errors, the misses and the
    median ms of a lease with exactly one miss."""
    random, stream = Random(1), cuda.make_stream()
    back = np.empty(RECORD_BYTES, np.uint8)
    num_wrong, one_miss_ms = 0, []
    for _ in range(400):
        layer, experts = random.randrange(NUM_LAYERS), random.sample(range(NUM_EXPERTS), 4)
        before = int(pager.residency.misses.sum())
        start_s = time.perf_counter()
        lease = pager.acquire(layer, experts)
        lease_ms = (time.perf_counter() - start_s) * 1e3
        if int(pager.residency.misses.sum()) == before + 1:
            one_miss_ms.append(lease_ms)
        for expert in experts:
            cuda.copy_from_device(back.ctypes.data, lease.address(expert), RECORD_BYTES)
            num_wrong += not np.array_equal(back, content[layer * NUM_EXPERTS + expert])
        lease.release(CudaFence(cuda, stream))
    cuda.destroy_stream(stream)
    misses = int(pager.residency.misses.sum())
    return num_wrong, misses, float(np.median(one_miss_ms))


if __name__ == "__main__":
    sys.exit(main())
