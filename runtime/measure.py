"""What a bundle costs on this machine: the figures of `run --json` and of `profile run`.

record    one turn: what it cost, and what ran
measure   many answers, each in a conversation of its own whose system prompt is read before, as it
          is while somebody speaks live; the first round warms up and is not counted
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge import host
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.bundle import Bundle
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.events import Metrics, Setup, TurnDone
from deeptalk_edge.runtime.settings import ConversationSettings

Array = NDArray[np.float32]


def record(done: TurnDone, setup: Setup) -> dict[str, Any]:
    """A turn, ready for JSON."""
    return {
        "text": done.text,
        **dataclasses.asdict(done.metrics),
        "real_time_factor": done.metrics.real_time_factor,
        **(dataclasses.asdict(done.voice) if done.voice else {}),
        **dataclasses.asdict(setup),
        "peak_resident_mb": host.peak_resident_mb(),
    }


class Spread(NamedTuple):
    """A figure over all answers."""

    median: float
    p95: float


FIGURES = {
    "first_sample_ms": "end of speech to first sample, ms",
    "encoder_ms": "  encoder, ms",
    "prefill_ms": "  prefill, ms",
    "first_frame_ms": "  first frame at, ms",
    "step_ms": "step, ms",
    "compute_s": "compute of an answer, s",
    "audio_s": "its sound, s",
    "real_time_factor": "compute per second of sound",
}
"""Name and line of each. A step's two figures are medians over the answers: of their medians, and
of their 95th percentiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a bundle costs on this machine."""

    bundle: str
    machine: str
    setup: Setup
    num_questions: int
    num_answers: int
    """Those that are counted."""
    load_ms: float
    """From a directory to a conversation that can be asked: hashes, graphs, golden outputs."""
    figures: Mapping[str, Spread | None]
    """By the names of FIGURES; None where no answer has it."""
    peak_resident_mb: float | None
    """Of the process, weights mapped from files included."""

    def as_json(self) -> dict[str, Any]:
        """One object without levels but for `precision`: `step_ms` is the median, `step_ms_p95` its
        neighbour."""
        content = dataclasses.asdict(self)
        figures = content.pop("figures")
        content |= content.pop("setup")
        for name, spread in figures.items():
            content[name], content[f"{name}_p95"] = spread or (None, None)
        return content

    def page(self) -> str:
        """The same for a person."""
        setup = self.setup
        precision = ", ".join(f"{part} {kind}" for part, kind in setup.precision.items())
        peak = self.peak_resident_mb
        lines = [
            f"bundle      {self.bundle}, SHA-256 {setup.bundle_sha256[:12]}",
            f"precision   {precision}",
            f"backend     {_backend(setup)}, {setup.threads} thread(s), {setup.mode}",
            f"machine     {self.machine}",
            f"answers     {self.num_answers} to {self.num_questions} question(s)",
            f"loaded in   {self.load_ms:.0f} ms",
            f"memory      {'unknown' if peak is None else f'{peak:.0f} MB'} at its peak",
            f"\n{'':38}{'median':>10}{'95 %':>10}",
        ]
        for name, line in FIGURES.items():
            spread = self.figures[name]
            shown = ["-", "-"] if spread is None else [f"{value:.3f}" for value in spread]
            lines.append(f"{line:38}" + "".join(f"{value:>10}" for value in shown))
        return "\n".join(lines)


def measure(
    place: Path,
    questions: Sequence[Array | str],
    *,
    choose: Callable[[Bundle], ConversationSettings] = ConversationSettings.of,
    repeat: int = 5,
) -> Report:
    """Ask every question `repeat` times and once before.

    Raises SettingsError if there is nothing to measure, else what `Bundle.open`, `Conversation` and
    `Conversation.ask` raise.
    """
    if repeat < 1 or not questions:
        raise SettingsError(
            f"{len(questions)} question(s), {repeat} time(s): expected 1 or more of both"
        )
    start_s = time.perf_counter()
    bundle = Bundle.open(place)
    with Conversation(bundle, choose(bundle)) as talk:
        load_ms = (time.perf_counter() - start_s) * 1000
        for question in questions:
            _answer(talk, question)
        turns = [_answer(talk, question) for _ in range(repeat) for question in questions]
        return Report(
            bundle=str(place),
            machine=_machine(),
            setup=talk.setup,
            num_questions=len(questions),
            num_answers=len(turns),
            load_ms=load_ms,
            figures=_figures(turns),
            peak_resident_mb=host.peak_resident_mb(),
        )


def _answer(talk: Conversation, question: Array | str) -> Metrics:
    talk.reset()
    talk.make_room()
    for event in talk.ask(question):
        if isinstance(event, TurnDone):
            return event.metrics
    raise AssertionError("`ask` ends with TurnDone or raises")


def _figures(turns: Sequence[Metrics]) -> dict[str, Spread | None]:
    def spread(name: str) -> Spread | None:
        return _spread(getattr(turn, name) for turn in turns)

    middle, tail = spread("step_ms_p50"), spread("step_ms_p95")
    steps = Spread(middle.median, tail.median) if middle and tail else None
    return {name: steps if name == "step_ms" else spread(name) for name in FIGURES}


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(*map(float, np.percentile(known, [50, 95]))) if known else None


def _backend(setup: Setup) -> str:
    return f"our kernels, {setup.kernel_path}" if setup.kernel_path else "ONNX Runtime"


def _machine() -> str:
    return (
        f"{host.processor()}, Python {platform.python_version()}, "
        f"onnxruntime {version('onnxruntime')}"
    )
