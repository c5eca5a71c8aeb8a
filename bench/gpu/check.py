"""Check and time the MoE kernels on this machine's NVIDIA GPU: `make gpu-check`.

It needs nvcc and a CUDA PyTorch, not TensorRT. It builds the plugin's kernels for the card,
compares every precision at the size of DeepTalk's experts with float64, and times them in a CUDA
graph against

    floor      bytes that must be read over the copy bandwidth, or operations over the matmul rate,
               both measured here a moment before; the larger
    baseline   the same layer in torch bfloat16: the faster of one matmul per expert, with the
               routing known beforehand, and torch's grouped matmul, with the sorting on the card

Calls rotate over two layers of 64 experts, so that weights come from DRAM, not from the L2 cache.
The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from deeptalk_edge.bench.gpu.moe_library import (
    ActivationDtype,
    MoeCall,
    MoeConfig,
    MoeLibrary,
    build_cuda,
)
from deeptalk_edge.bundle.expert_record import ExpertDtype

WIDTH, FFN_WIDTH, NUM_EXPERTS, TOP_K = 2048, 1408, 64, 6
NUM_LAYERS = 2
TOKENS = (1, 2, 16, 64, 256)
CASES: tuple[tuple[ExpertDtype, int | None, ActivationDtype], ...] = (
    ("bfloat16", None, "bfloat16"),
    ("float16", None, "float16"),
    ("int8", None, "bfloat16"),
    ("int8", None, "float16"),
    ("int4", 32, "bfloat16"),
    ("int4", 32, "float16"),
    ("int4", 64, "bfloat16"),
    ("int4", 64, "float16"),
    ("int4", 128, "bfloat16"),
    ("int4", 128, "float16"),
)
CALLS_PER_GRAPH = 20

# The reference rounds h, too; differences come from float32 sums and a few roundings of h the other
# way.
TOLERANCE = {"float16": 2e-4, "bfloat16": 1.5e-3}

Run = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the report; times are medians, in microseconds a call."""

    weights: str
    activations: str
    tokens: int
    experts: int
    error: float
    us: float
    floor_us: float
    bound: str
    gb_per_s: float
    share_of_copy: float
    baseline_us: float
    speedup: float


class Layers:
    """Layers of random experts as records in one arena, slots shuffled."""

    def __init__(
        self, config: MoeConfig, generator: torch.Generator, num_layers: int = NUM_LAYERS
    ) -> None:
        self.config = config
        self.record_format = config.record_format
        num_slots = num_layers * NUM_EXPERTS
        shape = (num_slots, self.record_format.record_bytes)
        self.arena = torch.full(shape, 0xFF, dtype=torch.uint8, device="cuda")
        order = torch.randperm(num_slots, generator=generator, device="cuda")
        self.slots = order.view(num_layers, NUM_EXPERTS).to(torch.int32).contiguous()
        for slot in range(num_slots):
            for name, section in self.record_format.sections.items():
                place = self.arena[slot, section.offset : section.end]
                place.copy_(
                    self._random(name, section.shape, generator).view(torch.uint8).flatten()
                )

    def _random(self, name: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        columns = self.config.width if name.startswith("gate_up") else self.config.ffn_width
        dtype = self.record_format.dtype
        if dtype in ("int8", "int4") and not name.endswith("_scales"):
            return torch.randint(0, 256, shape, generator=generator, device="cuda").to(torch.uint8)
        values: Tensor = torch.randn(shape, generator=generator, device="cuda") * columns**-0.5
        if dtype not in ("int8", "int4"):
            return values.to(cast("torch.dtype", getattr(torch, dtype)))
        spread = 74.0 if dtype == "int8" else 4.6  # standard deviation of uniform integers
        scales: Tensor = (
            0.5 + torch.rand(shape, generator=generator, device="cuda")
        ) * columns**-0.5
        return (scales / spread).to(torch.float32 if dtype == "int8" else torch.float16)

    def matrices(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """`gate_up` and `down` of one expert in float64, read back from its record."""
        record = self.arena[int(self.slots[layer, expert])]
        dtype = self.record_format.dtype
        values = {}
        for name, section in self.record_format.sections.items():
            raw = record[section.offset : section.end]
            if dtype == "int4" and not name.endswith("_scales"):
                signed = raw.view(torch.int8).to(torch.int16)
                pair = torch.stack(((signed & 15) - 8, signed >> 4), dim=-1)
                values[name] = pair.view(section.shape[0], -1).double()
                continue
            stored = {
                "f4": torch.float32,
                "f2": torch.float16,
                "i1": torch.int8,
                "u2": torch.bfloat16,
            }
            kind = section.dtype.str[-2:]
            values[name] = raw.view(stored[kind]).view(section.shape).double()
        for name in ("gate_up", "down"):
            if (scales := values.get(f"{name}_scales")) is not None:
                repeats = values[name].shape[1] // scales.shape[1]
                values[name] = values[name] * scales.repeat_interleave(repeats, dim=1)
        return values["gate_up"], values["down"]


@dataclass(frozen=True, slots=True)
class Uses:
    layer: int
    x: Tensor
    ids: Tensor
    weights: Tensor

    @property
    def experts(self) -> list[int]:
        return sorted(set(self.ids.flatten().tolist()))


def random_uses(tokens: int, dtype: torch.dtype, generator: torch.Generator) -> list[Uses]:
    """Make one routing per call of a graph; small calls go through all experts in turn."""
    turns = [
        torch.randperm(NUM_EXPERTS, generator=generator, device="cuda").tolist()
        for _ in range(NUM_LAYERS)
    ]
    uses = []
    for call in range(CALLS_PER_GRAPH):
        turn = turns[call % NUM_LAYERS]
        rows = []
        for _ in range(tokens):
            if tokens > 2:
                turn = torch.randperm(NUM_EXPERTS, generator=generator, device="cuda").tolist()
            rows.append(turn[:TOP_K])
            turn = turn[TOP_K:] + turn[:TOP_K]
        turns[call % NUM_LAYERS] = turn
        x = torch.randn((tokens, WIDTH), generator=generator, device="cuda").to(dtype)
        weights = torch.rand((tokens, TOP_K), generator=generator, device="cuda") * 0.3
        ids = torch.tensor(rows, dtype=torch.int32, device="cuda")
        uses.append(Uses(call % NUM_LAYERS, x, ids, weights))
    return uses


def reference(layers: Layers, uses: Uses) -> Tensor:
    """Compute the layer in float64, with h rounded to the activations' type, as in the kernels."""
    x, out = uses.x.double(), torch.zeros_like(uses.x, dtype=torch.float64)
    for expert in uses.experts:
        gate_up, down = layers.matrices(uses.layer, expert)
        tokens, ranks = (uses.ids == expert).nonzero().unbind(1)
        gate, up = (x[tokens] @ gate_up.T).chunk(2, dim=1)
        h = (F.silu(gate) * up).to(uses.x.dtype).double()
        out.index_add_(0, tokens, (h @ down.T) * uses.weights[tokens, ranks, None].double())
    return out


class Kernels:
    """Our kernels on one pair of layers."""

    def __init__(self, library: MoeLibrary, layers: Layers, tokens: int) -> None:
        self._library, self._layers = library, layers
        size = library.workspace_bytes(layers.config, tokens)
        # NaN in every format, so that a read of an unwritten value shows.
        self.workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
        self.missing = torch.full((1,), -1, dtype=torch.int32, device="cuda")

    def __call__(
        self,
        uses: Uses,
        out: Tensor,
        *,
        slots: Tensor | None = None,
        carry: Tensor | None = None,
        overlap: bool,
    ) -> None:
        layers = self._layers
        table = layers.slots[uses.layer] if slots is None else slots
        self._library.enqueue(
            layers.config,
            MoeCall(
                tokens=len(uses.x),
                num_slots=len(layers.arena),
                x=uses.x.data_ptr(),
                topk_ids=uses.ids.data_ptr(),
                topk_weights=uses.weights.data_ptr(),
                slot_table=table.data_ptr(),
                slot_arena=layers.arena.data_ptr(),
                out=out.data_ptr(),
                missing=self.missing.data_ptr(),
                workspace=self.workspace.data_ptr(),
                carry=0 if carry is None else carry.data_ptr(),
                float_out=out.dtype == torch.float32,
                overlap=overlap,
            ),
            torch.cuda.current_stream().cuda_stream,
        )


def check(kernels: Kernels, layers: Layers, uses: Uses, *, overlap: bool) -> float:
    """Return the relative error against float64, and check on the card every claim of the host
    tests.

    Raises AssertionError if slots, waves or the output's type change the result.
    """
    out = torch.full(uses.x.shape, torch.nan, device="cuda")
    kernels(uses, out, overlap=overlap)
    expected = reference(layers, uses)
    error = float((out - expected).norm() / expected.norm())
    assert int(kernels.missing) == 0, "experts were counted missing though all are resident"

    rounded = torch.full_like(uses.x, torch.nan)
    kernels(uses, rounded, overlap=overlap)
    assert torch.equal(rounded, out.to(rounded.dtype)), "the output is not the float one rounded"

    carry = None
    for wave in (range(NUM_EXPERTS // 3), range(NUM_EXPERTS // 3, NUM_EXPERTS)):
        table = torch.full((NUM_EXPERTS,), -1, dtype=torch.int32, device="cuda")
        table[list(wave)] = layers.slots[uses.layer, list(wave)]
        waved = torch.full_like(out, torch.nan)
        kernels(uses, waved, slots=table, carry=carry, overlap=overlap)
        absent = int((table[uses.ids.long()] < 0).sum())
        assert int(kernels.missing) == absent, "missing uses were miscounted"
        carry = waved
    assert carry is not None
    assert torch.equal(carry, out), "two waves gave other bits than one"
    return error


def captured_us(run: Run) -> float:
    """Median time of one of `CALLS_PER_GRAPH` calls, captured in one CUDA graph and replayed."""
    side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
    with torch.cuda.stream(side):
        for call in range(CALLS_PER_GRAPH):
            run(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(CALLS_PER_GRAPH):
            run(call)
    for _ in range(3):
        graph.replay()
    times: list[float] = []
    for _ in range(15):
        start, end = _event(), _event()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS_PER_GRAPH)
    return sorted(times)[len(times) // 2]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]


def copy_gb_per_s() -> float:
    """Rate of a large copy on the card, bytes read plus written, by copy engine or by kernel."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    by_engine = captured_us(lambda _: cast("None", target.copy_(source)))
    by_kernel = captured_us(lambda _: cast("None", torch.neg(source, out=target)))
    return 8 * source.numel() / min(by_engine, by_kernel) / 1e3


def matmul_tflop_per_s() -> float:
    """Rate of a large bfloat16 product of random numbers."""
    size = 8192
    a, b = (torch.randn((size, size), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    us = captured_us(lambda _: cast("None", torch.mm(a, b, out=out)))
    return 2 * size**3 / us / 1e6


class TorchBaseline:
    """The same layer in torch bfloat16, with all experts resident."""

    def __init__(self, generator: torch.Generator) -> None:
        def random(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float16)
            scaled: Tensor = values.to(torch.bfloat16) * shape[-1] ** -0.5
            return scaled

        self.gate_up = random(NUM_LAYERS, NUM_EXPERTS, 2 * FFN_WIDTH, WIDTH)
        self.down = random(NUM_LAYERS, NUM_EXPERTS, WIDTH, FFN_WIDTH)

    def best_us(self, uses: list[Uses]) -> float:
        picks = [
            [(expert, (use.ids == expert).nonzero()) for expert in use.experts] for use in uses
        ]
        times = [captured_us(lambda call: self._per_expert(uses[call], picks[call]))]
        if hasattr(torch, "_grouped_mm"):
            try:
                times.append(captured_us(lambda call: self._grouped(uses[call])))
            except RuntimeError as error:
                print(f"torch._grouped_mm: {error}", file=sys.stderr)
        return min(times)

    def _per_expert(self, uses: Uses, picks: list[tuple[int, Tensor]]) -> None:
        out = torch.zeros_like(uses.x, dtype=torch.float32)
        for expert, places in picks:
            tokens, ranks = places[:, 0], places[:, 1]
            gate, up = (uses.x[tokens] @ self.gate_up[uses.layer, expert].T).chunk(2, dim=1)
            y = (F.silu(gate) * up) @ self.down[uses.layer, expert].T
            out.index_add_(0, tokens, y * uses.weights[tokens, ranks, None])

    def _grouped(self, uses: Uses) -> None:
        flat = uses.ids.flatten()
        order = flat.argsort(stable=True)
        tokens = order // TOP_K
        experts = torch.arange(NUM_EXPERTS, device="cuda", dtype=torch.int32)
        ends = (flat[:, None] == experts).sum(0).cumsum(0).to(torch.int32)
        gate_up = self.gate_up[uses.layer].transpose(1, 2)
        gate, up = torch._grouped_mm(uses.x[tokens], gate_up, offs=ends).chunk(2, dim=1)
        y = torch._grouped_mm(F.silu(gate) * up, self.down[uses.layer].transpose(1, 2), offs=ends)
        out = torch.zeros_like(uses.x, dtype=torch.float32)
        out.index_add_(0, tokens, y * uses.weights.flatten()[order, None])


def measure(
    library: MoeLibrary, arguments: argparse.Namespace, ceilings: tuple[float, float], overlap: bool
) -> Iterator[Figure]:
    copy, matmul = ceilings
    generator = torch.Generator("cuda").manual_seed(arguments.seed)
    baseline_us: dict[int, float] = {}
    if not arguments.no_baseline:
        baseline = TorchBaseline(generator)
        for tokens in arguments.tokens:
            uses = random_uses(tokens, torch.bfloat16, generator)
            baseline_us[tokens] = baseline.best_us(uses)
        del baseline
        torch.cuda.empty_cache()
    for dtype, group, activation in CASES:
        name = dtype if group is None else f"{dtype}-{group}"
        if arguments.only and f"{name}:{activation}" not in arguments.only:
            continue
        config = MoeConfig(
            weight_dtype=dtype,
            group=group,
            activation_dtype=activation,
            width=WIDTH,
            ffn_width=FFN_WIDTH,
            num_experts=NUM_EXPERTS,
            top_k=TOP_K,
        )
        if refusal := library.refusal(config):
            raise RuntimeError(refusal)
        layers = Layers(config, generator)
        for tokens in arguments.tokens:
            all_uses = random_uses(tokens, getattr(torch, activation), generator)
            kernels = Kernels(library, layers, tokens)
            error = max(check(kernels, layers, uses, overlap=overlap) for uses in all_uses[:2])
            if not error < TOLERANCE[activation]:
                raise RuntimeError(f"{name} {activation}, {tokens} tokens: error {error:.2e}")
            out = torch.empty_like(all_uses[0].x)

            def run(
                call: int, kernels: Kernels = kernels, uses: Any = all_uses, out: Any = out
            ) -> None:
                kernels(uses[call], out, overlap=overlap)

            us = captured_us(run)
            experts = sum(len(uses.experts) for uses in all_uses) / len(all_uses)
            payload = max(section.end for section in config.record_format.sections.values())
            read_us = experts * payload / copy / 1e3
            math_us = tokens * TOP_K * 6 * WIDTH * FFN_WIDTH / matmul / 1e6
            torch_us = baseline_us.get(tokens, float("nan"))
            yield Figure(
                weights=name,
                activations=activation,
                tokens=tokens,
                experts=round(experts),
                error=error,
                us=us,
                floor_us=max(read_us, math_us),
                bound="memory" if read_us >= math_us else "arithmetic",
                gb_per_s=experts * payload / us / 1e3,
                share_of_copy=read_us / us,
                baseline_us=torch_us,
                speedup=torch_us / us,
            )
        del layers
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--only", nargs="+", help="cases such as int4-64:bfloat16")
    parser.add_argument("--no-overlap", action="store_true", help="no dependent launch on sm_90+")
    parser.add_argument("--no-baseline", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu-check: PyTorch sees no CUDA device; the kernels have not run")
    major, minor = torch.cuda.get_device_capability()
    sm = 10 * major + minor
    if sm < 80:
        sys.exit(f"gpu-check: sm_{sm}; the kernels need the tensor cores of sm_80 or newer")
    overlap = sm >= 90 and not arguments.no_overlap
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    with tempfile.TemporaryDirectory() as folder:
        library = MoeLibrary(build_cuda(Path(folder), sm))
        ceilings = copy_gb_per_s(), matmul_tflop_per_s()
        device = torch.cuda.get_device_name()
        print(f"{device}, sm_{sm}: copy {ceilings[0]:.0f} GB/s, matmul {ceilings[1]:.0f} TFLOP/s")
        print("| weights | activations | T | experts | error | µs | floor µs ", end="")
        print(f"| GB/s | of copy | torch µs | speedup |\n{'|---' * 11}|")
        figures = []
        for figure in measure(library, arguments, ceilings, overlap):
            print(
                f"| {figure.weights} | {figure.activations} | {figure.tokens} | {figure.experts} "
                f"| {figure.error:.1e} | {figure.us:.1f} | {figure.floor_us:.1f} ({figure.bound}) "
                f"| {figure.gb_per_s:.0f} | {figure.share_of_copy:.0%} | {figure.baseline_us:.0f} "
                f"| {figure.speedup:.1f} |",
                flush=True,
            )
            figures.append(asdict(figure))
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    report = {
        "device": device,
        "sm": sm,
        "torch": torch.__version__,
        "nvcc": nvcc.strip().splitlines()[-1],
        "overlap": overlap,
        "copy_gb_per_s": ceilings[0],
        "matmul_tflop_per_s": ceilings[1],
        "results": figures,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
