"""Measures a bundle on this machine: the figures of `run --json` and of `profile`.

record    one turn: its cost and its setup
measure   many answers, each in a new conversation whose system prompt is fed before, as it is live
          while the user speaks; the first round warms up and is not counted
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge import host
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.events import Metrics, Setup, Transcript, TurnDone
from deeptalk_edge.runtime.settings import ConversationSettings

Array = NDArray[np.float32]


def record(done: TurnDone, setup: Setup) -> dict[str, Any]:
    """Return a turn's figures for JSON."""
    return {
        "text": done.text,
        **dataclasses.asdict(done.metrics),
        "real_time_factor": done.metrics.real_time_factor,
        **(dataclasses.asdict(done.voice) if done.voice else {}),
        **dataclasses.asdict(setup),
        "peak_resident_mb": host.peak_resident_mb(),
    }


def transcript_record(transcript: Transcript | None) -> dict[str, Any]:
    """Return the transcript of a spoken question for JSON; empty for a typed one."""
    if transcript is None:
        return {}
    return {
        "transcript": transcript.text,
        "transcript_confidence": transcript.confidence,
        "no_transcript": transcript.reason,
    }


FIGURES = {
    "first_sample_ms": "end of speech to first sample, ms",
    "encoder_ms": "  encoder, ms",
    "prefill_ms": "  prefill, ms",
    "num_prompt_rows": "  prompt, rows",
    "first_frame_ms": "  first frame at, ms",
    "step_ms": "step, ms",
    "compute_s": "compute of an answer, s",
    "audio_s": "its sound, s",
    "real_time_factor": "compute per second of sound",
}
"""Name and description of each figure. A step's two figures are medians over the answers: of their
medians and of their 95th percentiles."""


def measure(
    place: Path,
    questions: Sequence[Array | str],
    *,
    choose: Callable[[Bundle], ConversationSettings] = ConversationSettings.of,
    repeat: int = 5,
) -> dict[str, Any]:
    """Ask every question once to warm up and then `repeat` times. Returns the setup, `load_ms`
    (from a directory to an open conversation) and the peak of this process's memory. For each of
    FIGURES it returns the median and, under the name with `_p95`, the 95th percentile; both are
    None if no answer has the figure.

    Raises SettingsError if there is nothing to measure, and the errors of `Bundle.open`,
    `Conversation` and `Conversation.ask`.
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
        return {
            "bundle": str(place),
            **dataclasses.asdict(talk.setup),
            "machine": _machine(),
            "num_questions": len(questions),
            "num_answers": len(turns),
            "load_ms": load_ms,
            "peak_resident_mb": host.peak_resident_mb(),
            **_figures(turns),
        }


def page(report: Mapping[str, Any]) -> str:
    """Format the result of `measure` as text."""
    kernels, peak_mb = report["kernel_path"], report["peak_resident_mb"]
    backend = f"our kernels, {kernels}" if kernels else "ONNX Runtime"
    lines = [
        f"bundle      {report['bundle']}, SHA-256 {report['bundle_sha256'][:12]}",
        "precision   " + ", ".join(f"{part} {kind}" for part, kind in report["precision"].items()),
        f"backend     {backend}, {report['threads']} thread(s), {report['mode']}",
        f"machine     {report['machine']}",
        f"answers     {report['num_answers']} to {report['num_questions']} question(s)",
        f"loaded in   {report['load_ms']:.0f} ms",
        f"memory      {'unknown' if peak_mb is None else f'{peak_mb:.0f} MB'} at its peak",
        f"\n{'':38}{'median':>10}{'95 %':>10}",
    ]
    for name, line in FIGURES.items():
        values = report[name], report[f"{name}_p95"]
        shown = ("-" if value is None else f"{value:.3f}" for value in values)
        lines.append(f"{line:38}" + "".join(f"{value:>10}" for value in shown))
    return "\n".join(lines)


def _answer(talk: Conversation, question: Array | str) -> Metrics:
    talk.reset()
    talk.idle()
    for event in talk.ask(question):
        if isinstance(event, TurnDone):
            return event.metrics
    raise AssertionError("`ask` ends with TurnDone or raises")


def _figures(turns: Sequence[Metrics]) -> dict[str, float | None]:
    def over(name: str, percent: float) -> float | None:
        return _percentile([getattr(turn, name) for turn in turns], percent)

    spreads = {name: (over(name, 50), over(name, 95)) for name in FIGURES if name != "step_ms"}
    spreads["step_ms"] = over("step_ms_p50", 50), over("step_ms_p95", 50)
    medians = {name: median for name, (median, _) in spreads.items()}
    return medians | {f"{name}_p95": p95 for name, (_, p95) in spreads.items()}


def _percentile(values: list[float | None], percent: float) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.percentile(known, percent)) if known else None


def _machine() -> str:
    return (
        f"{host.processor()}, Python {platform.python_version()}, "
        f"onnxruntime {version('onnxruntime')}"
    )
