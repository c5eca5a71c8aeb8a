"""Processing of a synthesiser's sound; test_corpus.py runs the synthesisers."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.errors import AudioError
from deeptalk_edge.training.tiny import voices
from deeptalk_edge.training.tiny.voices import ANSWER_VOICE, PEAK_LEVEL, speak

RATE_HZ = 16000


def synthesise(monkeypatch: pytest.MonkeyPatch, samples: np.ndarray) -> None:
    """A program that replaces flite and speaks `samples`."""

    def call(command: list[str], text: str) -> str:
        with wave.open(str(Path(command[command.index("-o") + 1])), "wb") as recording:
            recording.setparams((1, 2, RATE_HZ, 0, "NONE", ""))
            recording.writeframes(samples.astype("<i2").tobytes())
        return ""

    monkeypatch.setattr(voices, "_call", call)


def test_silence_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    synthesise(monkeypatch, np.zeros(RATE_HZ))
    with pytest.raises(AudioError, match="says nothing for 'hello'"):
        speak("hello", ANSWER_VOICE, rate_hz=RATE_HZ)


@pytest.mark.parametrize("before_ms", [20, 500])
def test_speech_keeps_a_margin_and_has_one_peak(
    before_ms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, tone = before_ms * 16, 8000 * np.sin(np.arange(RATE_HZ))
    synthesise(monkeypatch, np.concatenate([np.zeros(before), tone, np.zeros(RATE_HZ)]))
    said = speak("hello", ANSWER_VOICE, rate_hz=RATE_HZ)
    assert len(said) == pytest.approx(RATE_HZ + min(before, 60 * 16) + 60 * 16, abs=4)
    assert np.abs(said.astype(float)).max() == pytest.approx(PEAK_LEVEL * 32767, abs=1)
