"""Simulated conversation: minutes here, an hour in the slow tests."""

from __future__ import annotations

import json

import pytest

from deeptalk_edge.bench import soak
from deeptalk_edge.runtime.loop.fake_talker import FakeAnswer
from deeptalk_edge.runtime.loop.playback import Playback


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_minutes_of_restless_conversation_have_no_faults(seed: int) -> None:
    report = soak.Soak(seed=seed).run(hours=0.05, turns=40)
    assert report.faults() == []
    assert report.simulated_turns >= 40
    assert min(report.barge_ins, report.resumed, report.discarded_on_trial) > 0


@pytest.mark.slow
def test_a_soak_includes_a_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "_LOSSES_PER_S", 1 / 10)
    report = soak.Soak(seed=3).run(hours=0.03, turns=10)
    assert report.faults() == []
    assert report.device_losses > 3


def test_sound_of_a_turn_that_is_over_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Playback, "pause", lambda self: min(self.heard, self.made))  # no pause
    report = soak.Soak(seed=1).run(hours=0.03, turns=10)
    assert any("samples of another turn" in fault for fault in report.faults())


def test_a_word_in_the_history_that_was_not_heard_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finish = FakeAnswer.finish
    monkeypatch.setattr(FakeAnswer, "finish", lambda self, heard=None: finish(self))
    report = soak.Soak(seed=1).run(hours=0.03, turns=10)
    assert any("were not heard" in fault for fault in report.faults())


@pytest.mark.slow
def test_an_hour_and_two_thousand_turns_have_no_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.main([]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["simulated_hours"] >= 1
    assert report["simulated_turns"] >= 2000
