"""Third part of the GPU check: the MoE kernels run on slots while the pager fills others.

Layers of experts are written to a file and paged through each GPU pool. The host never waits for
the GPU: every layer is leased, enqueued after work that delays the GPU, and released with a fence,
while the next layer's experts are read into other slots. Every output must have the same bits as
with a fully resident arena.

The last row of the report releases its leases without a fence and must be wrong, which shows that
the check can fail.
"""

from __future__ import annotations

import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from deeptalk_edge.bench.gpu.check import FFN_WIDTH, NUM_EXPERTS, TOP_K, WIDTH, Layers
from deeptalk_edge.bench.gpu.cuda_check import gpu_pools
from deeptalk_edge.bench.gpu.moe_library import MoeCall, MoeConfig, MoeLibrary, build_cuda
from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.runtime.cuda import CudaFence, Cudart
from deeptalk_edge.runtime.experts.pager import ExpertPager
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import Lru
from deeptalk_edge.runtime.experts.record_file import RecordFile

NUM_LAYERS, NUM_STEPS = 8, 60
POOL_SHARE = 0.15  # so small that slots are reused before the delayed GPU has read them
LATE_CYCLES = 3_000_000  # cycles of the GPU's clock: longer than a miss

CONFIG = MoeConfig(
    weight_dtype="int4",
    group=64,
    activation_dtype="bfloat16",
    width=WIDTH,
    ffn_width=FFN_WIDTH,
    num_experts=NUM_EXPERTS,
    top_k=TOP_K,
)


@dataclass(frozen=True, slots=True)
class Use:
    """One layer of one step."""

    layer: int
    experts: list[int]
    x: Tensor
    ids: Tensor
    weights: Tensor


class Decoder:
    """The kernels on any arena, on the current stream."""

    def __init__(self, library: MoeLibrary) -> None:
        self._library = library
        size = library.workspace_bytes(CONFIG, 1)
        self._workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self._missing = torch.zeros(1, dtype=torch.int32, device="cuda")

    def enqueue(self, use: Use, slots: Tensor, arena: int, num_slots: int) -> Tensor:
        """Compute a layer with its experts at `slots` (E,) of the arena: (1, C), float32."""
        out = torch.full((1, WIDTH), torch.nan, device="cuda")
        call = MoeCall(
            tokens=1,
            num_slots=num_slots,
            x=use.x.data_ptr(),
            topk_ids=use.ids.data_ptr(),
            topk_weights=use.weights.data_ptr(),
            slot_table=slots.data_ptr(),
            slot_arena=arena,
            out=out.data_ptr(),
            missing=self._missing.data_ptr(),
            workspace=self._workspace.data_ptr(),
            float_out=True,
        )
        self._library.enqueue(CONFIG, call, torch.cuda.current_stream().cuda_stream)
        return out


def random_uses(generator: torch.Generator) -> list[Use]:
    """Make steps that keep two thirds of the last step's experts."""
    random, uses = Random(0), []
    chosen = [random.sample(range(NUM_EXPERTS), TOP_K) for _ in range(NUM_LAYERS)]
    for _ in range(NUM_STEPS):
        for layer, last in enumerate(chosen):
            kept = random.sample(last, TOP_K - 2)
            others = [expert for expert in range(NUM_EXPERTS) if expert not in kept]
            chosen[layer] = experts = kept + random.sample(others, 2)
            x = torch.randn((1, WIDTH), generator=generator, device="cuda").to(torch.bfloat16)
            weights = torch.rand((1, TOP_K), generator=generator, device="cuda") * 0.3
            ids = torch.tensor([experts], dtype=torch.int32, device="cuda")
            uses.append(Use(layer, experts, x, ids, weights))
    return uses


def write(path: Path, layers: Layers) -> list[ExpertRecord]:
    """Write the arena slot by slot; returns the record of each expert."""
    slots, records = layers.slots.tolist(), []
    rows = layers.arena.cpu().numpy()
    with path.open("wb") as file:
        rows.tofile(file)
    for layer in range(NUM_LAYERS):
        for expert in range(NUM_EXPERTS):
            row = rows[slots[layer][expert]]
            records.append(
                ExpertRecord(
                    layer=layer,
                    expert=expert,
                    offset=slots[layer][expert] * row.nbytes,
                    bytes=row.nbytes,
                    crc32=zlib.crc32(row),
                )
            )
    return records


def paged(
    decoder: Decoder, pager: ExpertPager, cuda: Cudart, uses: Sequence[Use], *, fenced: bool
) -> tuple[list[Tensor], float]:
    """Run all uses; returns their outputs and the milliseconds of a step."""
    stream = torch.cuda.current_stream().cuda_stream
    pool, arena = pager.pool, pager.pool.address(0)
    # Pinned before the GPU is delayed, because pinning memory waits for the GPU.
    tables = torch.full((len(uses), NUM_EXPERTS), -1, dtype=torch.int32).pin_memory()
    outs = []
    start_s = time.perf_counter()
    for i, (use, table) in enumerate(zip(uses, tables, strict=True)):
        lease = pager.acquire(use.layer, use.experts)
        for expert in use.experts:
            table[expert] = (lease.address(expert) - arena) // pool.slot_bytes
        torch.cuda._sleep(LATE_CYCLES)  # type: ignore[no-untyped-call, unused-ignore]
        outs.append(decoder.enqueue(use, table.cuda(non_blocking=True), arena, pool.num_slots))
        lease.release(CudaFence(cuda, stream) if fenced else None)
        if i + 1 < len(uses):
            pager.hint(uses[i + 1].layer, uses[i + 1].experts[:2])
    torch.cuda.synchronize()
    return outs, (time.perf_counter() - start_s) * 1e3 / NUM_STEPS


def main() -> int:
    """Check every pool; returns the exit code."""
    if not torch.cuda.is_available():
        sys.exit("gpu-check: PyTorch sees no CUDA device; kernels on paged slots have not run")
    major, minor = torch.cuda.get_device_capability()
    cuda, generator = Cudart(), torch.Generator("cuda").manual_seed(0)
    layers = Layers(CONFIG, generator, NUM_LAYERS)
    uses = random_uses(generator)
    pools = gpu_pools(
        cuda,
        num_slots=int(POOL_SHARE * len(layers.arena)),
        slot_bytes=CONFIG.record_format.record_bytes,
        num_records=len(layers.arena),
    )
    failed = False
    side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
    with tempfile.TemporaryDirectory() as place, torch.cuda.stream(side):
        decoder = Decoder(MoeLibrary(build_cuda(Path(place), 10 * major + minor)))
        arena = layers.arena.data_ptr()
        expected = [
            decoder.enqueue(use, layers.slots[use.layer], arena, len(layers.arena)) for use in uses
        ]
        path = Path(place) / "experts.bin"
        records = write(path, layers)
        for name, is_fenced in [*((name, True) for name in pools), ("mirrored", False)]:
            with ExpertPager(
                records, RecordFile(path), pools[name](), Lru(len(records)), PagerSettings()
            ) as pager:
                paged(decoder, pager, cuda, uses, fenced=is_fenced)  # fills a mirror from disk
                outs, step_ms = paged(decoder, pager, cuda, uses, fenced=is_fenced)
                misses = int(pager.residency.misses.sum())
            wrong = sum(
                not torch.equal(out, right) for out, right in zip(outs, expected, strict=True)
            )
            failed |= (wrong > 0) is is_fenced
            print(
                f"{name:10}{'fenced' if is_fenced else 'NO FENCE':10}{wrong} wrong of {len(uses)} "
                f"layers, {misses} misses, {step_ms:.2f} ms a step of {NUM_LAYERS} layers"
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
