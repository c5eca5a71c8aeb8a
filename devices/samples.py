"""What each turn cost: the raw samples of a profile, and their distributions."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deeptalk_edge.devices.report import Distribution, distribution
from deeptalk_edge.files import write_file
from deeptalk_edge.runtime.events import Stopped, TurnDone


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One turn, as it is written to the samples' file. Milliseconds; None: there was none."""

    turn: int
    is_warmup: bool
    start_s: float
    """Of `time.monotonic`."""
    end_s: float
    eot_hangover_ms: float | None
    ttfa_ms: float | None
    """From the turn's end as it was noticed to the first sample in the loudspeaker's queue; 0 where
    the answer was begun inside the hangover and was ready."""
    v2v_ms: float | None
    """From the last voiced sample to the first audible one."""
    encoder_ms: float | None
    prefill_ms: float
    first_frame_ms: float | None
    first_sample_ms: float | None
    step_ms_p50: float | None
    step_ms_p95: float | None
    rtf: float | None
    """Compute over sound, below 1 is faster."""
    audio_s: float
    heard_s: float
    underruns: int
    barge_in_stop_ms: float | None
    was_speculative: bool
    num_prompt_rows: int
    num_rows: int
    stopped: Stopped


def sample_of(number: int, done: TurnDone, start_s: float, *, is_warmup: bool) -> Sample:
    """Of a turn that ends now."""
    voice, metrics = done.voice, done.metrics
    assert voice is not None  # it was asked by voice
    ttfa_ms = None
    if voice.queued_ms is not None:
        ttfa_ms = max(voice.queued_ms - voice.hangover_ms, 0.0)
    return Sample(
        turn=number,
        is_warmup=is_warmup,
        start_s=start_s,
        end_s=time.monotonic(),
        eot_hangover_ms=voice.hangover_ms,
        ttfa_ms=ttfa_ms,
        v2v_ms=voice.audible_ms,
        encoder_ms=metrics.encoder_ms,
        prefill_ms=metrics.prefill_ms,
        first_frame_ms=metrics.first_frame_ms,
        first_sample_ms=metrics.first_sample_ms,
        step_ms_p50=metrics.step_ms_p50,
        step_ms_p95=metrics.step_ms_p95,
        rtf=metrics.real_time_factor,
        audio_s=metrics.audio_s,
        heard_s=voice.heard_s,
        underruns=voice.underruns,
        barge_in_stop_ms=voice.stop_ms,
        was_speculative=voice.was_speculative,
        num_prompt_rows=metrics.num_prompt_rows,
        num_rows=metrics.num_rows,
        stopped=metrics.stopped,
    )


_METRICS = ("v2v_ms", "ttfa_ms", "eot_hangover_ms", "rtf", "heard_s", "barge_in_stop_ms")
_STAGES = ("encoder_ms", "prefill_ms", "first_frame_ms", "first_sample_ms", "step_ms_p50")


def metrics_of(turns: Sequence[Sample]) -> dict[str, Distribution]:
    """What a listener notices."""
    return {name: distribution([getattr(turn, name) for turn in turns]) for name in _METRICS}


def stages_of(turns: Sequence[Sample]) -> dict[str, Distribution]:
    """Encoder and prefill by themselves; first frame and first sample from the question on."""
    return {name: distribution([getattr(turn, name) for turn in turns]) for name in _STAGES}


def write_samples(place: Path, turns: Sequence[Sample]) -> None:
    """A JSON object a line. Raises SettingsError if the place cannot be written."""
    lines = [json.dumps(dataclasses.asdict(turn)) for turn in turns]
    write_file(place, ("\n".join(lines) + "\n").encode())
