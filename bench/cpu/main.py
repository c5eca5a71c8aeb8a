"""Compares our decoder at official width with its roofline and its peers.

One run gives one table. Every contender is a process with random weights of the same shapes.
Contenders and numbers of threads alternate call by call; figures are medians. The 27 layers have 16
experts each, so that all contenders fit into memory together; a step reads as much as with 64.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

from deeptalk_edge.bench.cpu.contest import Call, Contender, Timing, Work, take_turns
from deeptalk_edge.bench.cpu.gguf_file import write_gguf
from deeptalk_edge.bench.cpu.llama import MODULES, Q4_0, LlamaDecoder, see_packages, takes
from deeptalk_edge.bench.cpu.native import PROBE_BYTES, CpuDecoder, CpuForm, ReadProbe
from deeptalk_edge.bench.cpu.report import (
    HEADER,
    NATIVE,
    PROBE,
    STOCK,
    Frame,
    Row,
    frame_table,
    goal_table,
    line,
)
from deeptalk_edge.bench.cpu.sizes import mlp_weights, step_bytes
from deeptalk_edge.bench.cpu.sound import SoundEnd
from deeptalk_edge.bench.cpu.stock import StockDecoder
from deeptalk_edge.bench.cpu.stock_graph import STOCK_FORM
from deeptalk_edge.bench.harness import OFFICIAL_SIZE, arguments, measured
from deeptalk_edge.bundle.expert_record import INT4_GROUPS
from deeptalk_edge.checkpoint.config import read_model_spec
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.runtime.backends.cpu.library import CACHE_KINDS, CpuLibrary

SOUND = "sound"

Key = tuple[str, str, int]
"""Key of a figure: contender, work and number of threads."""

_PARTS = [(NATIVE, "first_layer"), (NATIVE, "heads"), (SOUND, "sample"), (SOUND, "decode_frame")]
_SPARE_ROWS = 64  # after the longest context


def main(argv: list[str] | None = None) -> int:
    """Measure; print the table, a frame's parts and the goals, and write all figures as JSON."""
    parser = arguments("cpu", __doc__)
    parser.add_argument("--like", type=Path, default=OFFICIAL_SIZE)
    parser.add_argument("--model", nargs="+", type=_model, default=["5x64", "27x16"])
    parser.add_argument("--context", type=int, nargs="+", default=[256, 1024, 2048, 4096])
    parser.add_argument("--prefill", type=int, nargs="*", default=[64, 256], help="rows")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--group", type=int, default=64, choices=(0, *INT4_GROUPS), help="0 is int8"
    )
    parser.add_argument("--cache", default="bfloat16", choices=tuple(CACHE_KINDS))
    parser.add_argument("--path", help="kernel path; the processor's best one by default")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="of all ratios")
    parser.add_argument("--repeat", type=int, default=11, help="rounds of steps")
    parser.add_argument("--prefill-repeat", type=int, default=3, help="they take seconds each")
    parser.add_argument("--peer", nargs="*", default=[], choices=(STOCK, *MODULES))
    parser.add_argument("--packages", type=Path, default=Path("build/peers"), help="of the peers")
    parser.add_argument("--work", type=Path, default=Path("build/cpu"))
    args = parser.parse_args(argv)
    with measured(args) as figures:
        args.work.mkdir(parents=True, exist_ok=True)
        weights = f"int4 in groups of {args.group}" if args.group else "int8"
        tunables = os.environ.get("GLIBC_TUNABLES", "none")
        path = args.path or CpuLibrary().path_names[0]
        print(
            f"ratios by {args.clock} time; ours {weights}, cache {args.cache}, SNAC in "
            f"float32, both on {path}; {tunables}\n"
        )
        print(HEADER)
        spec = read_model_spec(args.like)
        rows: list[Row] = []
        frames: list[Frame] = []
        for model in args.model:
            num_layers, num_experts = map(int, model.split("x"))
            decoder = replace(spec.decoder, num_layers=num_layers, num_experts=num_experts)
            sized = replace(spec, decoder=decoder)
            peers = [name for name in args.peer if takes(name, num_layers)]
            with _contenders(sized, peers, args) as contenders:
                bench = _Bench(model, sized, contenders, args)
                for row in bench.measure():
                    print(line(row), flush=True)
                    rows.append(row)
                if num_layers > decoder.num_dense_layers:
                    frames += bench.frames(len(spec.decoder.moe_layers))
        if "ik_llama.cpp" in args.peer:
            print("\nik_llama.cpp takes only 27 layers.")
        print("\nOne frame, all included, ms:\n")
        print(*frame_table(frames), sep="\n")
        print("\nGoals, one thread unless said:\n")
        print(*goal_table(rows, frames), sep="\n")
        figures["rows"] = [asdict(row) for row in rows]
        figures["frames"] = [asdict(one) for one in frames]
    return 0


@contextmanager
def _contenders(
    spec: ModelSpec, peers: Sequence[str], args: argparse.Namespace
) -> Iterator[dict[str, Contender]]:
    """Open ours, the peers and the probe by name, each with the decoder's shapes."""
    form, threads = _cpu_form(args), args.threads
    cache_rows = max([*args.context, *args.prefill]) + _SPARE_ROWS
    opens: dict[str, Callable[[], object]] = {
        PROBE: partial(ReadProbe, form, threads),
        SOUND: partial(SoundEnd, args.like / "snac", spec.vocabulary, threads, form.path),
        NATIVE: partial(CpuDecoder, spec, form, threads, cache_rows),
    }
    if STOCK in peers:
        opens[STOCK] = partial(StockDecoder, spec, args.work, threads, cache_rows)
    with ExitStack() as stack:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            model = Path(folder) / "random.gguf"
            names = [name for name in peers if name in MODULES]
            if names:
                see_packages(args.packages)
                write_gguf(model, spec)
            sizes = {"num_tokens": spec.vocabulary.size, "cache_rows": cache_rows}
            for name in names:
                opens[name] = partial(LlamaDecoder, args.packages, name, model, **sizes)
            contenders = {
                name: stack.enter_context(
                    closing(Contender(name, open_one, args.work / f"{name}.log"))
                )
                for name, open_one in opens.items()
            }
        yield contenders


def _model(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text}: expected LAYERSxEXPERTS, for example 27x16")
    return text


def _cpu_form(args: argparse.Namespace) -> CpuForm:
    return CpuForm(group=args.group, cache=args.cache, path=args.path)


class _Bench:
    """Measures one decoder."""

    def __init__(
        self,
        model: str,
        spec: ModelSpec,
        contenders: Mapping[str, Contender],
        args: argparse.Namespace,
    ) -> None:
        self._model, self._spec, self._contenders, self._args = model, spec, contenders, args
        forms = {STOCK: STOCK_FORM, **dict.fromkeys(MODULES, Q4_0)}
        forms[NATIVE] = _cpu_form(args).stored
        self._forms = {name: forms[name] for name in contenders if name in forms}
        self._steps: dict[int, Mapping[Key, Timing]] = {}

    def measure(self) -> Iterator[Row]:
        """Run prefills first, because they need an empty cache."""
        args = self._args
        for num_rows in args.prefill:
            warm_up = int(num_rows == args.prefill[0])
            works = self._works(0, num_rows)
            timings = take_turns(works, args.prefill_repeat, warm_up=warm_up)
            yield from self._rows("prefill", num_rows, timings)
        for position in sorted(args.context):
            for name in self._forms:  # all threads take less time
                self._contenders[name].call(("use", max(args.threads)))
                self._contenders[name].call(("fill", position))
            works = self._works(position, 1) | self._parts(position)
            self._steps[position] = timings = take_turns(works, args.repeat)
            yield from self._rows("step", position, timings)

    def frames(self, num_moe_layers: int) -> Iterator[Frame]:
        """Compute a frame after each context, with `num_moe_layers` layers like the measured
        one."""
        decoder = self._spec.decoder
        for position, timings in self._steps.items():
            for threads in self._args.threads:
                step, layer_0, heads, sampling, codec = (
                    1e3 * self._seconds(timings[who, what, threads])
                    for who, what in [(NATIVE, "feed"), *_PARTS]
                )
                yield Frame(
                    decoder=self._model,
                    num_rows=position,
                    threads=threads,
                    dense_layer_ms=layer_0,
                    moe_layer_ms=(step - layer_0 - heads) / len(decoder.moe_layers),
                    num_moe_layers=num_moe_layers,
                    heads_ms=heads,
                    sampling_ms=sampling,
                    codec_ms=codec,
                )

    def _works(self, position: int, num_rows: int) -> dict[Key, Work]:
        """List the work of the probe and every decoder, with all numbers of threads."""
        works = {}
        for threads in self._args.threads:
            probe = Work(contender=self._contenders[PROBE], timed=("read", threads))
            works[PROBE, "read", threads] = probe
            for name in self._forms:
                works[name, "feed", threads] = Work(
                    contender=self._contenders[name],
                    timed=("feed", num_rows),
                    before=(("use", threads), ("fill", position)),
                )
        return works

    def _parts(self, position: int) -> dict[Key, Work]:
        """List the parts of our step, and the rest of a frame."""
        works = {}
        for threads in self._args.threads:
            for who, what in _PARTS:
                before: tuple[Call, ...] = (("use", threads),)
                if who == NATIVE:
                    before += (("fill", position),)
                works[who, what, threads] = Work(
                    contender=self._contenders[who], timed=(what,), before=before
                )
        return works

    def _rows(
        self, what: Literal["step", "prefill"], num_rows: int, timings: Mapping[Key, Timing]
    ) -> Iterator[Row]:
        decoder = self._spec.decoder
        flops = 2.0 * num_rows * mlp_weights(decoder) if what == "prefill" else None
        memories = {name: self._contenders[name].memory() for name in (PROBE, *self._forms)}
        for threads in self._args.threads:
            probe_gb_s = PROBE_BYTES / self._seconds(timings[PROBE, "read", threads]) / 1e9
            native_s = self._seconds(timings[NATIVE, "feed", threads])
            for name, memory in memories.items():
                is_probe = name == PROBE
                timing = timings[name, "read" if is_probe else "feed", threads]
                seconds = self._seconds(timing)
                num_bytes = None
                if is_probe:
                    num_bytes = float(PROBE_BYTES)
                elif what == "step":
                    num_bytes = step_bytes(self._spec, self._forms[name], num_rows)
                gb_s = num_bytes / seconds / 1e9 if num_bytes else None
                yield Row(
                    decoder=self._model,
                    what="read" if is_probe else what,
                    num_rows=num_rows,
                    threads=threads,
                    by=name,
                    wall_ms=1e3 * timing.wall_s,
                    cpu_ms=1e3 * timing.cpu_s,
                    gb_s=gb_s,
                    probe_share=gb_s / probe_gb_s if gb_s else None,
                    gflop_s=flops / seconds / 1e9 if flops and not is_probe else None,
                    times_native=None if is_probe else seconds / native_s,
                    huge_share=memory.huge_share,
                    resident_gb=memory.resident_bytes / 1e9,
                )

    def _seconds(self, timing: Timing) -> float:
        return timing.wall_s if self._args.clock == "wall" else timing.cpu_s
