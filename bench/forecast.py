"""Compares the planner's figures with measured ones on this machine, in one run.

full width   three layers of the official width with random int8 weights: a step after 256 rows and
             a prefill of 64; full-size SNAC; misses of the expert pager on this disk
tiny         the step of a trained bundle, which is mostly overhead: predicted from the sampler and
             the overhead of a layer, measured on two other small decoders

The machine's rates are measured in the same rounds, so each figure is predicted from rates of the
same seconds. Memory and int8 products are measured as by `deeptalk-edge probe`, the codec by one of
half the widths. Each figure is the fastest of its rounds, because other load can only slow it down.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.bench.cpu.native import CpuDecoder, CpuForm, ReadProbe
from deeptalk_edge.bench.cpu.sound import SoundEnd
from deeptalk_edge.bench.harness import (
    KERNEL_BUNDLE,
    OFFICIAL_SIZE,
    arguments,
    measured,
    spoken_questions,
)
from deeptalk_edge.bundle.expert_record import ExpertRecord
from deeptalk_edge.bundle.precision import CPU_KERNELS
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.checkpoint.config import read_codec_spec, read_model_spec
from deeptalk_edge.devices.measure import disk_read_gb_per_s
from deeptalk_edge.devices.plan.device import MEASURED
from deeptalk_edge.devices.plan.memory import record_format
from deeptalk_edge.devices.plan.times import Question, Rates, times
from deeptalk_edge.devices.plan.work import ModelWork, codec_frame_operations
from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.model.spec import CodecSpec, ModelSpec
from deeptalk_edge.runtime.backends.cpu.library import CpuContext, CpuLibrary, Matrix, span
from deeptalk_edge.runtime.experts.pager import ExpertPager
from deeptalk_edge.runtime.experts.pager_settings import PagerSettings
from deeptalk_edge.runtime.experts.policy import Lru
from deeptalk_edge.runtime.experts.pool import CpuPool
from deeptalk_edge.runtime.experts.record_file import RecordFile
from deeptalk_edge.runtime.measure import measure

_LAYERS, _CACHED_ROWS, _PREFILL_ROWS = 3, 256, 64
_RECORD_BYTES, _RECORDS = 4_460_544, 48
_SIZE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One predicted and measured figure, in milliseconds."""

    figure: str
    predicted_ms: float
    measured_ms: float

    @property
    def off(self) -> float:
        return self.predicted_ms / self.measured_ms - 1


def shortened(model: ModelSpec, num_layers: int) -> ModelSpec:
    """Return the model with fewer layers of the same width."""
    decoder = dataclasses.replace(model.decoder, num_layers=num_layers)
    return dataclasses.replace(model, decoder=decoder)


def full_width(model: ModelSpec, codec: CodecSpec, rounds: int) -> list[Checked]:
    """Measure step, prefill and SNAC, with the rates of the same rounds."""
    spec = shortened(model, _LAYERS)
    decoder = CpuDecoder(spec, CpuForm(group=0), (1,), _CACHED_ROWS + _PREFILL_ROWS)
    sound = SoundEnd(OFFICIAL_SIZE / "snac", spec.vocabulary, (1,), None)
    probe = ReadProbe(CpuForm(group=0), (1,))
    product = _product()
    with tempfile.TemporaryDirectory() as folder:
        half = _half_of(OFFICIAL_SIZE / "snac", Path(folder))
        small = SoundEnd(Path(folder), spec.vocabulary, (1,), None)

    def prefill() -> None:
        decoder.fill(0)
        decoder.feed(_PREFILL_ROWS)

    def step() -> None:
        decoder.fill(_CACHED_ROWS)
        decoder.feed(1)

    found = fastest(
        {
            "read": lambda: probe.read(1),
            "product": product,
            "small codec": small.decode_frame,
            "step": step,
            "prefill": prefill,
            "codec": sound.decode_frame,
        },
        rounds=rounds,
    )
    rates = Rates(
        memory_gb_per_s=(256 << 20) / found["read"] / 1e6,
        product_tops=2.0 * _SIZE * _SIZE * 64 / found["product"] / 1e9,
        encoder_tops=codec_frame_operations(half) / found["small codec"] / 1e9,
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


def _half_of(codec: Path, folder: Path) -> CodecSpec:
    """Make a codec of half the widths."""
    config = json.loads((codec / "config.json").read_text(encoding="utf-8"))
    for name in ("encoder_dim", "decoder_dim"):
        config[name] //= 2
    config.pop("latent_dim", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_codec_spec(folder)


def fastest(ways: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Run every way in turn for some rounds; returns the fastest time of each in ms."""
    best = dict.fromkeys(ways, float("inf"))
    for done in range(rounds + 1):
        for name, run in ways.items():
            start_s = time.perf_counter()
            run()
            if done:
                best[name] = min(best[name], (time.perf_counter() - start_s) * 1000)
    return best


def _planned(spec: ModelSpec, codec: CodecSpec, rates: Rates) -> Any:
    profile = load_profile("cpu-int8")
    work = ModelWork.of(spec, codec, CPU_KERNELS, record_format(spec, profile))
    assumptions = dataclasses.replace(MEASURED, prompt_rows=_PREFILL_ROWS)
    asked = Question(seconds=0.0, context_rows=_CACHED_ROWS, num_items=1, encoder_frames=1)
    return times(work, rates, asked, 1.0, assumptions)


def _product() -> Callable[[], object]:
    context = CpuContext(CpuLibrary(), threads=1)
    weights, scales = np.ones((_SIZE, _SIZE), np.int8), np.full(_SIZE, 0.01, np.float32)
    matrix = Matrix(span(weights), span(scales), _SIZE, _SIZE, 0)
    x = np.ones((64, _SIZE), np.float32)

    def run(kept: tuple[Any, ...] = (weights, scales)) -> object:
        return context.linear(matrix, x)

    return run


def paging(folder: Path, rounds: int) -> Checked:
    """Measure a miss of the pager on the disk under `folder`."""
    rates = [disk_read_gb_per_s(folder, _RECORD_BYTES, depths=(4,))[4] for _ in range(5)]
    known = [rate.value for rate in rates if rate.value is not None]
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".forecast-") as file:
        block = np.random.default_rng(0).bytes(_RECORD_BYTES)
        for _ in range(_RECORDS):
            file.write(block)
        file.flush()
        waits = _misses(Path(file.name), block, rounds)
    return Checked(
        figure="a miss of the pager, 4.46 MB",
        predicted_ms=_RECORD_BYTES / max(known) / 1e6,
        measured_ms=min(waits),
    )


def _misses(path: Path, block: bytes, rounds: int) -> list[float]:
    import zlib

    crc = zlib.crc32(block)
    records = [
        ExpertRecord(
            layer=0, expert=expert, offset=expert * _RECORD_BYTES, bytes=_RECORD_BYTES,
            crc32=crc,
        )
        for expert in range(_RECORDS)
    ]  # fmt: skip
    pager = ExpertPager(
        records,
        RecordFile(path),
        CpuPool(num_slots=16, slot_bytes=_RECORD_BYTES),
        Lru(_RECORDS),
        PagerSettings(),
    )
    waits = []
    with pager:
        for number in range(_RECORDS + 4 * rounds):
            start_s = time.perf_counter()
            pager.acquire(0, [number % _RECORDS]).release()
            waits.append((time.perf_counter() - start_s) * 1000)
    return waits[_RECORDS:]  # without first loads, which also verify the record


def tiny(place: Path, model: ModelSpec, rounds: int) -> Checked:
    """Measure the step of a bundle with one item."""
    bundle = Bundle.open(place)
    spec = bundle.manifest.model
    small = {count: _small_decoder(spec, count) for count in (2, 6)}
    sound = SoundEnd(OFFICIAL_SIZE / "snac", spec.vocabulary, (1,), None)
    found = fastest(
        {
            "2 layers": lambda: small[2].feed(1),
            "6 layers": lambda: small[6].feed(1),
            "sampler": sound.sample,
        },
        rounds=20 * rounds,
    )
    layer_ms = (found["6 layers"] - found["2 layers"]) / 4
    fixed_ms = found["2 layers"] - 2 * layer_ms + found["sampler"]
    question = spoken_questions("*-0.wav")[0]
    from deeptalk_edge.runtime.audio.vad import read_utterance
    from deeptalk_edge.runtime.settings import ConversationSettings

    def step_ms(backend: Any) -> float:
        def choose(bundle: Bundle) -> ConversationSettings:
            settings = ConversationSettings.of(bundle, mode="single")
            return dataclasses.replace(settings, backend=backend)

        report = measure(place, [read_utterance(question)], choose=choose, repeat=rounds)
        return float(report["step_ms"])

    loop_ms = step_ms("fake")  # the turn's work around a decoder that computes nothing
    return Checked(
        figure="step of the tiny bundle, one item",
        predicted_ms=fixed_ms + spec.decoder.num_layers * layer_ms + loop_ms,
        measured_ms=step_ms("cpu"),
    )


def _small_decoder(spec: ModelSpec, num_layers: int) -> CpuDecoder:
    """Make a decoder of the bundle's width with random weights."""
    decoder = CpuDecoder(shortened(spec, num_layers), CpuForm(group=0), (1,), 256)
    decoder.fill(128)
    return decoder


def main(argv: list[str] | None = None) -> int:
    """Predict, measure, and print both."""
    parser = arguments("forecast", __doc__)
    parser.add_argument("--rounds", type=int, default=9)
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
            tiny(args.bundle, model, args.rounds),
        ]
        print(f"{'':42}{'predicted ms':>14}{'measured ms':>14}{'off':>8}")
        for one in checked:
            shown = f"{one.predicted_ms:14.3f}{one.measured_ms:14.3f}{one.off:8.0%}"
            print(f"{one.figure:42}{shown}")
        figures.update({one.figure: dataclasses.asdict(one) | {"off": one.off} for one in checked})
    return 0


if __name__ == "__main__":
    sys.exit(main())
