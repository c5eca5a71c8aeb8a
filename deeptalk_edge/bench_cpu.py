"""`make bench-cpu`: the native decoder at official width on this machine, beside its roofline.

Weights are random and lie in huge pages; experts are drawn at random, so nothing is measured from a
cache that a real talk would not have. What is compared takes turns in one process. `--clock cpu`
counts the process's CPU time: on a busy machine it still compares one thread with one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from ctypes import byref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bench_cpu_peers import MODULES, LlamaPeer, write_gguf
from deeptalk_edge.expert_record import RecordFormat
from deeptalk_edge.runtime.backends.huge_pages import huge_array
from deeptalk_edge.runtime.backends.native_library import (
    CACHE_KINDS,
    DecoderSizes,
    Layer,
    Matrix,
    NativeContext,
    NativeLibrary,
    Pass,
    address,
)
from deeptalk_edge.runtime.backends.native_weights import record_of
from deeptalk_edge.spec import ModelSpec, read_model_spec

PROBE_BYTES = 256 << 20
_PIECE_BYTES = 1 << 20
MAX_TOKENS = 256

Step = Callable[[], object]
Figures = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(prog="bench_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--like", type=Path, default=Path("checkpoints/official-size"))
    parser.add_argument("--model", action="append", help="LAYERSxEXPERTS; default 5x64 and 27x16")
    parser.add_argument("--context", type=int, action="append", help="default 256, 1024, 4096")
    parser.add_argument("--prefill", type=int, action="append", help="default 64 and 256")
    parser.add_argument("--threads", type=int, action="append", help="default 1 and 2")
    parser.add_argument("--group", type=int, default=64, choices=(0, 64, 128), help="0 is int8")
    parser.add_argument("--cache", default="bfloat16", choices=tuple(CACHE_KINDS))
    parser.add_argument("--path", help="kernel path; the processor's best one by default")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"))
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--peer", action="append", default=[], choices=tuple(MODULES))
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="their packages")
    args = parser.parse_args(argv)
    form = f"{'int8' if not args.group else f'int4, groups of {args.group}'}, cache {args.cache}"
    print(f"{_processor()}; {args.clock} time; {form}; medians of {args.repeat} interleaved\n")
    print("| decoder | threads | what | by | ms | GB/s | of read probe | GFLOP/s | x native |")
    print("|---|---|---|---|---|---|---|---|---|")
    spec = read_model_spec(args.like)
    figures: list[dict[str, Any]] = []
    for model in args.model or ["5x64", "27x16"]:
        num_layers, num_experts = map(int, model.split("x"))
        decoder = replace(spec.decoder, num_layers=num_layers, num_experts=num_experts)
        sized = replace(spec, decoder=decoder)
        weights = _RandomWeights(sized, args.group)
        gguf = args.peers / f"{model}.gguf"
        if args.peer and not gguf.is_file():
            write_gguf(args.peers, gguf, sized)
        for threads in args.threads or [1, 2]:
            for name, one in _measure_all(weights, gguf, threads, args):
                print(f"| {model} | {threads} | {name} | " + _columns(one), flush=True)
                figures.append({"model": model, "threads": threads, "what": name, **one})
        gguf.unlink(missing_ok=True)
    print(json.dumps({"machine": _processor(), "clock": args.clock, "form": form, "rows": figures}))
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """One thing to time, and what it takes at least."""

    run: Step
    num_bytes: int = 0
    flops: float = 0.0
    before: Step = lambda: None
    """Not timed."""


def _measure_all(
    weights: _RandomWeights, gguf: Path, threads: int, args: argparse.Namespace
) -> Iterator[tuple[str, Figures]]:
    """What was done, and how fast each contender did it."""
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    contexts = args.context or [256, 1024, 4096]
    context = NativeContext(NativeLibrary(), path=args.path, threads=threads)
    native = _NativeDecoder(weights, context, args.cache, max(contexts))
    peers = {name: LlamaPeer(args.peers, name, gguf, threads=threads) for name in args.peer}
    for rows, position in [(1, rows) for rows in contexts] + [
        (rows, 0) for rows in args.prefill or [64, 256]
    ]:
        work = {"native": native.work(position, rows)}
        for name, peer in peers.items():
            work[name] = _peer_work(peer, position, rows)
        what = f"step behind {position} rows" if rows == 1 else f"prefill of {rows} rows"
        for name, one in _measure(work, native.probe, clock, args.repeat).items():
            yield what, {"by": name, **one}
    for peer in peers.values():
        peer.close()
    native.close()


def _peer_work(peer: LlamaPeer, position: int, rows: int) -> _Work:
    if rows == 1:
        peer.prepare(position, position)
        return _Work(run=lambda: peer.feed(1))
    return _Work(run=lambda: peer.feed(rows), before=lambda: peer.prepare(0, rows))


def _measure(
    work: dict[str, _Work], probe: _Work, clock: Callable[[], float], repeat: int
) -> dict[str, Figures]:
    """Medians by name; all of them and the probe take turns."""
    everything = {**work, "": probe}
    times: dict[str, list[float]] = {name: [] for name in everything}
    for _ in range(repeat + 1):  # the first round warms up
        for name, one in everything.items():
            one.before()
            start_s = clock()
            one.run()
            times[name].append(clock() - start_s)
    median_s = {name: statistics.median(values[1:]) for name, values in times.items()}
    probe_rate = probe.num_bytes / median_s.pop("") / 1e9
    return {
        name: {
            "ms": s * 1e3,
            "gb_s": work[name].num_bytes / s / 1e9,
            "probe_gb_s": probe_rate,
            "gflop_s": work[name].flops / s / 1e9,
            "times_native": s / median_s["native"],
        }
        for name, s in median_s.items()
    }


def _columns(one: Figures) -> str:
    rate, share, flops = "", "", f"{one['gflop_s']:.0f}" if one["gflop_s"] else ""
    if one["gb_s"]:
        rate = f"{one['gb_s']:.1f}"
        share = f"{100 * one['gb_s'] / one['probe_gb_s']:.0f} % of {one['probe_gb_s']:.1f}"
    cells = (one["by"], f"{one['ms']:.2f}", rate, share, flops, f"{one['times_native']:.2f}")
    return " | ".join(cells) + " |"


class _RandomWeights:
    """A decoder's weights in one arena: random bytes, scales that keep activations finite."""

    def __init__(self, spec: ModelSpec, group: int) -> None:
        decoder = spec.decoder
        self.spec = spec
        self._group = group
        self._random = np.random.default_rng(0)
        self.records = RecordFormat(
            dtype="int4" if group else "int8",
            group=group or None,
            width=decoder.width,
            ffn_width=decoder.expert_ffn_width,
        )
        step = group or 16
        dense_width = -(-decoder.dense_ffn_width // step) * step
        self.dense = replace(self.records, ffn_width=dense_width)
        self._kept: list[NDArray[Any]] = []
        self.tables = np.zeros((decoder.num_layers, decoder.num_experts), np.uint64)
        for layer in decoder.moe_layers:
            for expert in range(decoder.num_experts):
                self.tables[layer, expert] = self._record(self.records)
        self.matrix_bytes = 0
        self.norm = np.ones(decoder.width, np.float32)
        self.table = self._matrix(spec.vocabulary.size, decoder.width)
        self.layers = (Layer * decoder.num_layers)(*map(self._layer, range(decoder.num_layers)))

    def active_bytes(self, num_experts: int) -> int:
        """What a pass reads that uses so many routed experts of each layer."""
        decoder = self.spec.decoder
        mlps = len(decoder.moe_layers) * (num_experts + decoder.num_shared_experts)
        router_bytes = len(decoder.moe_layers) * decoder.num_experts * decoder.width * 4
        dense_bytes = decoder.num_dense_layers * self.dense.content_bytes
        records_bytes = mlps * self.records.content_bytes
        return self.matrix_bytes + records_bytes + dense_bytes + router_bytes

    def _layer(self, index: int) -> Layer:
        decoder = self.spec.decoder
        heads, is_dense = decoder.num_heads, index not in decoder.moe_layers
        count = 1 if is_dense else decoder.num_shared_experts
        form = self.dense if is_dense else self.records
        own = np.array([self._record(form) for _ in range(count)], np.uint64)
        router = np.random.default_rng(index).standard_normal(
            (decoder.num_experts, decoder.width), np.float32
        )
        self._kept += [own, router]
        qkv_rows = heads * decoder.nope_dim + (heads + 1) * decoder.rope_dim + decoder.latent_dim
        return Layer(
            record=record_of(form),
            qkv=self._matrix(qkv_rows, decoder.width),
            key_up=self._matrix(heads * decoder.latent_dim, decoder.nope_dim),
            value_up=self._matrix(heads * decoder.value_dim, decoder.latent_dim),
            out=self._matrix(decoder.width, heads * decoder.value_dim),
            attention_norm=self.norm.ctypes.data,
            latent_norm=self.norm.ctypes.data,
            mlp_norm=self.norm.ctypes.data,
            router=None if is_dense else router.ctypes.data,
            own_mlps=own.ctypes.data,
            num_own_mlps=count,
        )

    def _matrix(self, rows: int, columns: int) -> Matrix:
        group = self._group
        weights = self._random_array(rows * columns // (2 if group else 1))
        scales = huge_array(rows * (columns // group * 2 if group else 4))
        _fill_scales(scales, group)
        self._kept += [weights, scales]
        self.matrix_bytes += weights.nbytes + scales.nbytes
        return Matrix(weights.ctypes.data, scales.ctypes.data, rows, columns, group)

    def _record(self, form: RecordFormat) -> int:
        record = self._random_array(form.record_bytes)
        for name in ("gate_up_scales", "down_scales"):
            section = form.sections[name]
            _fill_scales(record[section.offset : section.end], self._group)
        self._kept.append(record)
        return record.ctypes.data

    def _random_array(self, num_bytes: int) -> NDArray[np.uint8]:
        array = huge_array(num_bytes)
        # No two the same: on repeated ones all tokens would come to choose the same experts.
        for start in range(0, num_bytes, _PIECE_BYTES):
            part = array[start : start + _PIECE_BYTES]
            part[:] = np.frombuffer(self._random.bytes(len(part)), np.uint8)
        return array


def _fill_scales(place: NDArray[np.uint8], group: int) -> None:
    place.view(np.float16 if group else np.float32)[:] = 0.004 if group else 0.0003


class _NativeDecoder:
    """The native decoder on random weights, ready to be timed."""

    def __init__(
        self, weights: _RandomWeights, context: NativeContext, cache_kind: str, cache_rows: int
    ) -> None:
        self._weights, self._context, self._calls = weights, context, context.calls
        decoder = weights.spec.decoder
        self._cache_rows = cache_rows + MAX_TOKENS
        row_bytes = context.cache_row_bytes(decoder.latent_dim, decoder.rope_dim, cache_kind)
        self._cache = huge_array(decoder.num_layers * self._cache_rows * row_bytes)
        self._cache[:] = 0x3C  # about 0.01 as bfloat16 or as a scale
        self._frequencies = np.array(decoder.rope_frequencies(), np.float32)
        sizes = DecoderSizes(
            width=decoder.width,
            num_layers=decoder.num_layers,
            heads=decoder.num_heads,
            nope=decoder.nope_dim,
            rope=decoder.rope_dim,
            value=decoder.value_dim,
            latent=decoder.latent_dim,
            num_experts=decoder.num_experts,
            top_k=decoder.top_k,
            num_codebooks=weights.spec.vocabulary.num_codebooks,
            cache_kind=CACHE_KINDS[cache_kind],
            max_tokens=MAX_TOKENS,
            norm_epsilon=decoder.norm_eps,
            softmax_scale=decoder.softmax_scale,
            rope_amplitude=1.0,
            routed_scale=decoder.routed_scale,
            cache_rows=self._cache_rows,
            rope_frequencies=self._frequencies.ctypes.data,
            final_norm=weights.norm.ctypes.data,
            table=weights.table,
        )
        self._decoder = self._calls.dt_decoder_open(context.handle, byref(sizes), weights.layers)
        if self._decoder is None:
            raise ValueError(self._calls.dt_message(context.handle).decode())
        addresses = [row.ctypes.data for row in weights.tables]
        self._tables = np.array(addresses, np.uint64)
        self._logits = np.empty((1, weights.spec.vocabulary.size), np.float32)
        self._random = np.random.default_rng(1)
        memory = huge_array(PROBE_BYTES)
        memory[:] = 1
        self.probe = _Work(run=lambda: context.read(memory), num_bytes=PROBE_BYTES)

    def work(self, position: int, num_rows: int) -> _Work:
        """Feed rows behind `position` cached ones; a single row gets its logits too."""
        spec = self._weights.spec
        decoder = spec.decoder
        shape = (num_rows, spec.vocabulary.num_codebooks + 1)
        base = self._cache.ctypes.data
        where = Pass(base, (base, 0), 1, num_rows, position, 0)

        def run() -> None:
            ids = self._random.integers(0, spec.vocabulary.size, shape)
            check, calls = self._context.check, self._calls
            check(calls.dt_begin(self._decoder, byref(where), address(ids), None, None), "begin")
            stages = 2 * decoder.num_layers
            check(calls.dt_run(self._decoder, 0, stages, address(self._tables)), "run")
            if num_rows == 1:
                check(calls.dt_head(self._decoder, address(self._logits)), "head")

        mlps = decoder.top_k + decoder.num_shared_experts
        weights_of_row = len(decoder.moe_layers) * mlps * 3 * decoder.expert_ffn_width
        weights_of_row += decoder.num_dense_layers * 3 * decoder.dense_ffn_width
        flops = 2.0 * num_rows * weights_of_row * decoder.width
        if num_rows > 1:  # how many experts they share is not known
            return _Work(run=run, flops=flops)
        cached_bytes = position * self._cache.nbytes // self._cache_rows
        num_bytes = self._weights.active_bytes(decoder.top_k) + cached_bytes
        return _Work(run=run, num_bytes=num_bytes, flops=flops)

    def close(self) -> None:
        self._calls.dt_decoder_close(self._decoder)
        self._context.close()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
