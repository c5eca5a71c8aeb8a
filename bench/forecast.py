"""The planner's figures beside measured ones on this machine, in one run.

full width   three layers of the official width with random int8 weights: a step after 256 rows
             and a prefill of 64; full-size SNAC; the wait for six experts that the pager misses
tiny         the step of a trained bundle, which is overhead: predicted from the overhead of a
             layer, measured on two other small decoders, and from the sampler, each after a frame
             of the codec, which takes the caches in a turn, too

The machine's rates are measured as `deeptalk-edge probe` measures them, in the same rounds as what
they predict. What one thread computes is measured by its processor time, so other programs have no
part in either side but through caches and memory; reads and turns by the clock. All are medians.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.bench.cpu.native import PROBE_BYTES, CpuDecoder, CpuForm, ReadProbe
from deeptalk_edge.bench.cpu.sound import SoundEnd
from deeptalk_edge.bench.harness import (
    KERNEL_BUNDLE,
    OFFICIAL_SIZE,
    TINY,
    arguments,
    measured,
    spoken_questions,
)
from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.bundle.precision import CPU_KERNELS
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.checkpoint.config import read_codec_spec, read_model_spec
from deeptalk_edge.devices.measure import DiskReads
from deeptalk_edge.devices.plan.device import MEASURED
from deeptalk_edge.devices.plan.memory import record_format
from deeptalk_edge.devices.plan.times import Question, Rates, times
from deeptalk_edge.devices.plan.work import ModelWork
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.model.spec import CodecSpec, ModelSpec
from deeptalk_edge.runtime.audio.vad import read_utterance
from deeptalk_edge.runtime.backends.cpu.library import CpuContext, CpuLibrary, Matrix, span
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.events import TurnDone
from deeptalk_edge.runtime.experts.pager import ExpertPager
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import Lru
from deeptalk_edge.runtime.experts.pool import CpuPool
from deeptalk_edge.runtime.experts.record_file import RecordFile
from deeptalk_edge.runtime.settings import ConversationSettings

GOAL = 0.25
_LAYERS, _CACHED_ROWS, _PREFILL_ROWS = 3, 256, 64
_RECORD_BYTES, _RECORDS, _MISSES = 4_460_544, 48, 6
_SIZE, _BLAS_SIZE, _SNAKE = 2048, 768, (128, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One figure, in milliseconds."""

    figure: str
    predicted_ms: float
    measured_ms: float

    @property
    def off(self) -> float:
        return self.predicted_ms / self.measured_ms - 1


def shortened(model: ModelSpec, num_layers: int) -> ModelSpec:
    """The same width with fewer layers."""
    decoder = dataclasses.replace(model.decoder, num_layers=num_layers)
    return dataclasses.replace(model, decoder=decoder)


def full_width(model: ModelSpec, codec: CodecSpec, rounds: int) -> list[Checked]:
    """Step, prefill and SNAC, with the rates of the same rounds."""
    spec = shortened(model, _LAYERS)
    decoder = CpuDecoder(spec, CpuForm(group=0), (1,), _CACHED_ROWS + _PREFILL_ROWS)
    sound = SoundEnd(OFFICIAL_SIZE / "snac", spec.vocabulary, (1,), None)
    probe = ReadProbe(CpuForm(group=0), (1,))
    kernels = CpuContext(CpuLibrary(), threads=1)
    square = np.ones((_BLAS_SIZE, _BLAS_SIZE), np.float32)
    values, alpha = np.ones(_SNAKE, np.float32), np.ones(_SNAKE[0], np.float32)

    def prefill() -> None:
        decoder.fill(0)
        decoder.feed(_PREFILL_ROWS)

    def step() -> None:
        decoder.fill(_CACHED_ROWS)
        decoder.feed(1)

    found = processor_ms(
        {
            "read": lambda: probe.read(1),
            "int8 product": _product(kernels),
            "float product": lambda: square @ square,
            "snake": lambda: kernels.snake(values, alpha),
            "step": step,
            "prefill": prefill,
            "codec": sound.decode_frame,
        },
        rounds=rounds,
    )
    rates = Rates(
        memory_gb_per_s=PROBE_BYTES / found["read"] / 1e6,
        product_tops=2.0 * _SIZE * _SIZE * _PREFILL_ROWS / found["int8 product"] / 1e9,
        encoder_tops=2.0 * _BLAS_SIZE**3 / found["float product"] / 1e9,
        activations_g_per_s=values.size / found["snake"] / 1e6,
    )
    expected = _planned(spec, codec, rates)
    return [
        Checked(
            figure=f"step of {_LAYERS} layers after {_CACHED_ROWS} rows",
            predicted_ms=expected.step_ms[1],
            measured_ms=found["step"],
        ),
        Checked(
            figure=f"prefill of {_PREFILL_ROWS} rows, {_LAYERS} layers",
            predicted_ms=expected.prefill_ms,
            measured_ms=found["prefill"],
        ),
        Checked(figure="SNAC, a frame", predicted_ms=expected.codec_ms, measured_ms=found["codec"]),
    ]


def processor_ms(ways: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Run every way in turn, a round apart; the median of this process's time on processors."""
    return _medians(ways, rounds, time.process_time)


def _medians(
    ways: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for done in range(rounds + 1):
        for name, run in ways.items():
            start_s = clock()
            run()
            if done:
                taken[name].append((clock() - start_s) * 1000)
    return {name: statistics.median(values) for name, values in taken.items()}


def _planned(spec: ModelSpec, codec: CodecSpec, rates: Rates) -> Any:
    profile = load_profile("cpu-int8")
    work = ModelWork.of(spec, codec, CPU_KERNELS, record_format(spec, profile), keeps_last_row=True)
    assumptions = dataclasses.replace(MEASURED, prompt_rows=_PREFILL_ROWS)
    asked = Question(seconds=0.0, context_rows=_CACHED_ROWS, num_items=1, encoder_frames=1)
    return times(work, rates, asked, 1.0, assumptions)


def _product(kernels: CpuContext) -> Callable[[], object]:
    weights, scales = np.ones((_SIZE, _SIZE), np.int8), np.full(_SIZE, 0.01, np.float32)
    matrix = Matrix(span(weights), span(scales), _SIZE, _SIZE, 0)
    x = np.ones((_PREFILL_ROWS, _SIZE), np.float32)

    def run(kept: tuple[Any, ...] = (weights, scales)) -> object:
        return kernels.linear(matrix, x)

    return run


def paging(folder: Path, rounds: int) -> Checked:
    """What a step waits for when six experts are missed, read from the disk under `folder`."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".forecast-") as file:
        block = np.random.default_rng(0).bytes(_RECORD_BYTES)
        for _ in range(_RECORDS):
            file.write(block)
        file.flush()
        path = Path(file.name)
        reads, pager = DiskReads(path, _RECORD_BYTES), _pager(path, block)
        order = np.random.default_rng(1).permutation(_RECORDS).reshape(-1, _MISSES).tolist()
        rates, waits = [], []
        with pager:
            for missed in order:  # a record's first load checks it, too
                pager.acquire(0, missed).release()
            for number in range(2 * rounds):
                rates.append(reads.gb_per_s(PagerSettings().readers, _MISSES))
                start_s = time.perf_counter()
                pager.acquire(0, order[number % len(order)]).release()
                waits.append((time.perf_counter() - start_s) * 1000)
        reads.close()
    return Checked(
        figure=f"stall for {_MISSES} experts of 4.46 MB",
        predicted_ms=_MISSES * _RECORD_BYTES / statistics.median(rates) / 1e6,
        measured_ms=statistics.median(waits),
    )


def _pager(path: Path, block: bytes) -> ExpertPager:
    """Over a file of equal records, with a pool of a third of them."""
    crc = zlib.crc32(block)
    records = [
        ExpertRecord(
            layer=0, expert=expert, offset=expert * _RECORD_BYTES, bytes=_RECORD_BYTES, crc32=crc
        )
        for expert in range(_RECORDS)
    ]
    pool = CpuPool(num_slots=_RECORDS // 3, slot_bytes=_RECORD_BYTES)
    return ExpertPager(records, RecordFile(path), pool, Lru(_RECORDS), PagerSettings())


def tiny(place: Path, rounds: int) -> Checked:
    """The step of a bundle, one item, in turns that speak."""
    bundle = Bundle.open(place)
    spec = bundle.manifest.model
    small = {count: _small_decoder(spec, count) for count in (2, 6)}
    sound = SoundEnd(TINY / "snac", spec.vocabulary, (1,), None)
    question = read_utterance(spoken_questions("*-0.wav")[0])
    settings = dataclasses.replace(ConversationSettings.of(bundle, mode="single"), backend="cpu")
    steps, parts = [], []
    with Conversation(bundle, settings) as talk:
        for done in range(rounds + 1):
            talk.reset()
            turn = next(event for event in talk.ask(question) if isinstance(event, TurnDone))
            part = {
                "2 layers": _after_a_frame(sound, lambda: small[2].feed(1)),
                "6 layers": _after_a_frame(sound, lambda: small[6].feed(1)),
                "sampler": _after_a_frame(sound, sound.sample),
            }
            if done and turn.metrics.step_ms_p50 is not None:
                steps.append(turn.metrics.step_ms_p50)
                parts.append(part)
    found = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    layer_ms = (found["6 layers"] - found["2 layers"]) / 4
    fixed_ms = found["2 layers"] - 2 * layer_ms + found["sampler"]
    return Checked(
        figure="step of the tiny bundle, one item",
        predicted_ms=fixed_ms + spec.decoder.num_layers * layer_ms,
        measured_ms=statistics.median(steps),
    )


def _after_a_frame(sound: SoundEnd, run: Callable[[], object]) -> float:
    """The median in ms, each time after the codec has made a frame."""
    found = _medians({"frame": sound.decode_frame, "run": run}, 20, time.perf_counter)
    return found["run"]


def _small_decoder(spec: ModelSpec, num_layers: int) -> CpuDecoder:
    """As wide as the bundle's, of random weights."""
    decoder = CpuDecoder(shortened(spec, num_layers), CpuForm(group=0), (1,), 256)
    decoder.fill(128)
    return decoder


def main(argv: list[str] | None = None) -> int:
    """Predict, measure, and print both."""
    parser = arguments("forecast", __doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--place", type=Path, default=Path("build"), help="on the disk to page from"
    )
    parser.add_argument("--bundle", type=Path, default=KERNEL_BUNDLE)
    args = parser.parse_args(argv)
    args.place.mkdir(parents=True, exist_ok=True)
    model, codec = read_model_spec(OFFICIAL_SIZE), read_codec_spec(OFFICIAL_SIZE / "snac")
    with measured(args) as figures:
        checked = [
            *full_width(model, codec, args.rounds),
            paging(args.place, args.rounds),
            tiny(args.bundle, args.rounds),
        ]
        print(f"{'':42}{'predicted ms':>14}{'measured ms':>14}{'off':>8}")
        for one in checked:
            shown = f"{one.predicted_ms:14.3f}{one.measured_ms:14.3f}{one.off:8.0%}"
            print(f"{one.figure:42}{shown}{'' if abs(one.off) <= GOAL else '  over 25 %'}")
        figures.update({one.figure: dataclasses.asdict(one) | {"off": one.off} for one in checked})
    return 0


if __name__ == "__main__":
    sys.exit(main())
