"""What one answer has cost so far: time within its steps, rows, and the figures of its metrics."""

from __future__ import annotations

import numpy as np

from deeptalk_edge.runtime.backends.stages import GpuStages
from deeptalk_edge.runtime.decoding import Decoding
from deeptalk_edge.runtime.events import Metrics
from deeptalk_edge.runtime.meter import Meter
from deeptalk_edge.runtime.verdict import Verdict


class AnswerCost:
    """Of one answer. What runs its steps keeps the meter and notes what they cost."""

    def __init__(self, gpu_stages: GpuStages | None) -> None:
        self._gpu_stages = gpu_stages
        if gpu_stages is not None:
            gpu_stages.begin()
        self.meter = Meter()
        self.encoder_ms: float | None = None
        """None for a typed question."""
        self.num_prompt_rows = 0
        self.prefill_ms = 0.0

    def metrics(self, decoding: Decoding | None, verdict: Verdict) -> Metrics:
        """`decoding` is None if the question was refused before it was fed."""
        judgement = verdict.judgement
        step_ms = decoding.step_ms if decoding else []
        return Metrics(
            num_prompt_rows=self.num_prompt_rows,
            num_rows=decoding.rows.num_rows if decoding else 0,
            encoder_ms=self.encoder_ms,
            prefill_ms=self.prefill_ms,
            first_frame_ms=decoding.sound.first_frame_ms if decoding else None,
            first_sample_ms=decoding.sound.first_sample_ms if decoding else None,
            step_ms_p50=_percentile(step_ms, 50),
            step_ms_p95=_percentile(step_ms, 95),
            compute_s=self.meter.elapsed_ms() / 1000,
            audio_s=decoding.sound.audio_s if decoding else 0.0,
            text_log_p=decoding.text_log_p if decoding else None,
            understood_p=judgement.understood_p if judgement else None,
            right_p=judgement.right_p if judgement and decoding else None,
            gpu_ms=self._gpu_stages.summary() if self._gpu_stages else None,
            stopped="not_understood" if verdict.is_refused or not decoding else decoding.stopped,
            num_clamped=decoding.rows.num_clamped if decoding else 0,
        )


def _percentile(values: list[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None
