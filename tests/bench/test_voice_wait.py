"""`make bench NAME=voice_wait`: the shares of a wait add up to it, and none of them is negative."""

from __future__ import annotations

import pytest

from deeptalk_edge.bench.voice_wait import Turn, shares_of
from deeptalk_edge.runtime.events import Metrics, TurnDone, VoiceMetrics


def turn(wait_ms: float, *, hangover_ms: float, queued_ms: float, audible_ms: float) -> Turn:
    metrics = Metrics(
        num_prompt_rows=9,
        num_rows=9,
        encoder_ms=40.0,
        prefill_ms=20.0,
        first_frame_ms=80.0,
        first_sample_ms=95.0,
        step_ms_p50=1.0,
        step_ms_p95=1.0,
        compute_s=1.0,
        audio_s=1.0,
        understood_p=None,
        right_p=None,
        text_log_p=None,
        gpu_ms=None,
        stopped="end",
        num_clamped=0,
    )
    voice = VoiceMetrics(
        speech_s=1.0,
        hangover_ms=hangover_ms,
        was_speculative=True,
        num_discarded=0,
        queued_ms=queued_ms,
        audible_ms=audible_ms,
        heard_s=1.0,
        underruns=0,
        stop_ms=None,
    )
    return shares_of(wait_ms, TurnDone("", metrics, voice))


@pytest.mark.parametrize(
    ("wait_ms", "hangover_ms", "queued_ms", "audible_ms", "shares"),
    [
        (300.0, 200.0, 230.0, 280.0, [20, 200, 30, 50]),
        (270.0, 200.0, 230.0, 280.0, [0, 190, 30, 50]),  # detected before the last voiced sample
        (300.0, 200.0, 190.0, 280.0, [20, 200, 0, 80]),  # queued before the turn was over
        (150.0, 200.0, 230.0, 280.0, [0, 70, 30, 50]),
    ],
)
def test_no_stage_of_a_wait_is_negative_and_they_add_up(
    wait_ms: float, hangover_ms: float, queued_ms: float, audible_ms: float, shares: list[float]
) -> None:
    found = turn(wait_ms, hangover_ms=hangover_ms, queued_ms=queued_ms, audible_ms=audible_ms)
    assert [found.detection_ms, found.hangover_ms, found.model_ms, found.sound_ms] == shares
    assert sum(shares) == wait_ms
    assert [found.encoder_ms, found.prefill_ms] == [40, 20]
    assert [found.first_frame_ms, found.first_sample_ms] == [20, 15]


def test_a_shorter_hangover_marks_a_question_called_complete() -> None:
    assert turn(50.0, hangover_ms=200.0, queued_ms=230.0, audible_ms=280.0).is_early
    assert not turn(600.0, hangover_ms=500.0, queued_ms=530.0, audible_ms=580.0).is_early
