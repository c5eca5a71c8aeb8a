"""The report of the CPU bench: the table's rows, frames of sound, and goals with their figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

NATIVE, PROBE, STOCK, LLAMA, IK = "native", "read probe", "onnxruntime", "llama.cpp", "ik_llama.cpp"

FRAME_MS = 2048 / 24_000 * 1e3
"""Length of one SNAC frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure: a median."""

    decoder: str
    what: Literal["step", "prefill", "read"]
    num_rows: int
    """Rows in the cache before a step, or rows of a prefill."""

    threads: int
    by: str
    wall_ms: float
    cpu_ms: float
    gb_s: float | None
    probe_share: float | None
    gflop_s: float | None
    times_native: float | None
    huge_share: float
    resident_gb: float


HEADER = (
    "| decoder | what | threads | by | ms | CPU ms | GB/s | of read probe | GFLOP/s | x native "
    "| memory, huge pages |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def line(row: Row) -> str:
    """Format a row of the table."""
    what = {
        "step": f"step after {row.num_rows}",
        "prefill": f"prefill of {row.num_rows}",
        "read": "256 MiB",
    }[row.what]
    cells = (
        row.decoder,
        what,
        str(row.threads),
        row.by,
        f"{row.wall_ms:.2f}",
        f"{row.cpu_ms:.2f}",
        _shown(row.gb_s, "{:.1f}"),
        _shown(row.probe_share, "{:.0%}"),
        _shown(row.gflop_s, "{:.0f}"),
        _shown(row.times_native, "{:.2f}"),
        f"{row.resident_gb:.1f} GB, {row.huge_share:.0%}",
    )
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Time of one frame of sound at full size, part by part."""

    decoder: str
    """The measured layer, which represents all layers."""

    num_rows: int
    threads: int
    dense_layer_ms: float
    moe_layer_ms: float
    num_moe_layers: int
    heads_ms: float
    sampling_ms: float
    codec_ms: float

    @property
    def moe_ms(self) -> float:
        return self.num_moe_layers * self.moe_layer_ms

    @property
    def sum_ms(self) -> float:
        ends_ms = self.dense_layer_ms + self.heads_ms + self.sampling_ms + self.codec_ms
        return ends_ms + self.moe_ms


def frame_table(frames: Iterable[Frame]) -> Iterator[str]:
    yield "| of | context | threads | layer 0 | MoE layers | heads | sampling | SNAC | sum |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for one in frames:
        moe = f"{one.num_moe_layers} x {one.moe_layer_ms:.2f} = {one.moe_ms:.1f}"
        yield (
            f"| {one.decoder} | {one.num_rows} | {one.threads} | {one.dense_layer_ms:.1f} | {moe} "
            f"| {one.heads_ms:.1f} | {one.sampling_ms:.2f} | {one.codec_ms:.1f} "
            f"| {one.sum_ms:.1f} ms |"
        )


def goal_table(rows: Sequence[Row], frames: Sequence[Frame]) -> Iterator[str]:
    """Format each goal with its worst figure."""
    yield "| goal | worst figure | |\n|---|---|---|"
    steps = [row for row in rows if row.what == "step"]
    prefills = [row for row in rows if row.what == "prefill"]

    def times(
        of: list[Row], by: str, fits: Callable[[Row], bool] = lambda row: True
    ) -> list[float]:
        chosen = [row for row in of if row.by == by and row.threads == 1 and fits(row)]
        return [row.times_native for row in chosen if row.times_native is not None]

    short = times(steps, LLAMA, lambda row: row.num_rows == 256)
    yield _at_least("step after 256, times llama.cpp", short, 1.5)
    long = times(steps, LLAMA, lambda row: row.num_rows >= 2048)
    yield _at_least("step after 2048 and more, times llama.cpp", long, 2.0)
    yield _at_least("prefill, times llama.cpp", times(prefills, LLAMA), 1.5)
    yield _at_least("step and prefill, times ik_llama.cpp", times(steps + prefills, IK), 1.0)
    ours = [row for row in steps if row.by == NATIVE]
    shares = [row.probe_share for row in ours if row.threads == 1 and row.probe_share is not None]
    yield _at_least("step, share of the read probe", shares, 0.85)
    yield _at_least("step, two threads' gain", list(_gains(ours)), 1.7)
    for threads, most_ms in ((1, FRAME_MS), (2, 45.0)):
        sums = [one.sum_ms for one in frames if one.threads == threads]
        verdict = f"{max(sums):.1f} | {_verdict(max(sums) <= most_ms)}" if sums else _UNMEASURED
        yield f"| one frame, {threads} thread(s), at most {most_ms:.1f} ms | {verdict} |"


_UNMEASURED = "| not measured"


def _at_least(what: str, figures: Sequence[float], least: float) -> str:
    verdict = f"{min(figures):.2f} | {_verdict(min(figures) >= least)}" if figures else _UNMEASURED
    return f"| {what}, at least {least} | {verdict} |"


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _gains(steps: Sequence[Row]) -> Iterator[float]:
    """Return the wall time of one thread divided by that of two, by context."""
    places = {(row.decoder, row.num_rows, row.threads): row.wall_ms for row in steps}
    for (decoder, num_rows, threads), wall_ms in places.items():
        if threads == 1 and (decoder, num_rows, 2) in places:
            yield wall_ms / places[decoder, num_rows, 2]


def _shown(figure: float | None, form: str) -> str:
    return "" if figure is None else form.format(figure)
