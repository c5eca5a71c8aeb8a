"""The loudspeaker's echo in the microphone opens utterances only without cancellation."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.runtime.audio.detectors import GatedDetector, open_detector, silero_file
from deeptalk_edge.runtime.audio.echo import WebRtcEchoCanceller
from deeptalk_edge.runtime.audio.endpoint import Edge, Endpointer, EndpointSettings
from deeptalk_edge.runtime.audio.ports import MicFrame, SoundPort
from deeptalk_edge.runtime.audio.pyaudio_port import PyAudioPort
from deeptalk_edge.sound.wav import read_wav, resample
from tests.places import QUESTIONS_FOLDER
from tests.runtime.sound_card.conftest import Card
from tests.runtime.sound_card.trials import on_a_steady_machine

Array = NDArray[np.float32]

SECONDS = 10


def speech(seconds: float) -> Array:
    """Consecutive questions at 24 kHz."""
    spoken = [
        resample(read_wav(path), 24000).pcm for path in sorted(QUESTIONS_FOLDER.glob("*.wav"))
    ]
    return np.resize(np.concatenate(spoken), int(seconds * 24000))


def speak(port: SoundPort, answer: Array) -> list[MicFrame]:
    """Play the sound; returns the microphone and the far end during it."""
    frames: list[MicFrame] = []
    written = 0
    while len(frames) < len(answer) / 480:
        if written < len(answer) and port.queued < 24000:
            port.write(answer[written : written + 12000])
            written += 12000
        frame = port.read(0.2)
        if frame is not None:
            frames.append(frame)
    return frames


def num_triggers(detector: GatedDetector, frames: list[Array]) -> int:
    """Number of utterances that open: 100 ms of voice each."""
    endpointer = Endpointer(EndpointSettings(start_ms=100, hangover_ms=300))
    return sum(endpointer.push(detector.is_voiced(frame)) is Edge.OPENED for frame in frames)


def path_ms(mic: Array, far: Array) -> list[float]:
    """The echo's delay in every second."""
    delays = []
    for heard, played in zip(mic.reshape(-1, 16000), far.reshape(-1, 16000), strict=True):
        product = np.fft.rfft(heard, 32768) * np.conj(np.fft.rfft(played, 32768))
        delays.append(float(np.argmax(np.fft.irfft(product)[:8000])) / 16)
    return delays


@pytest.fixture
def card(stopped_card: Card) -> Card:
    """A card whose loudspeaker reaches its microphone."""
    stopped_card.start(echo_ms=40)
    return stopped_card


def through_still_air(port: PyAudioPort) -> tuple[Array, Array]:
    """Ten seconds of the microphone and the far end, (N,) each.

    The delay from the loudspeaker to the microphone is constant, as in a room.
    """
    port.open()
    try:
        frames = speak(port, speech(SECONDS))
    finally:
        port.close()
    mic = np.concatenate([frame.pcm for frame in frames])
    far = np.concatenate([frame.far for frame in frames])
    delays_ms = path_ms(mic, far)
    assert max(delays_ms) - min(delays_ms) < 1, delays_ms
    return mic, far


@on_a_steady_machine
def test_ten_seconds_of_own_speech_open_an_utterance_only_without_cancellation(
    card: Card, port: PyAudioPort
) -> None:
    pytest.importorskip("pywebrtc_audio")
    mic, far = through_still_air(port)
    canceller = WebRtcEchoCanceller()
    raw = list(mic.reshape(-1, 320))
    clean = [canceller.process(*pair) for pair in zip(raw, far.reshape(-1, 320), strict=True)]
    late = slice(3 * 50, None)
    power, left = (float(np.mean(np.square(x[late]))) for x in (raw, clean))
    erle_db = 10 * np.log10(power / left)
    print(f"ERLE {erle_db:.1f} dB after 3 s; echo delay {path_ms(mic, far)} ms")
    assert erle_db > 20
    for name in ("webrtc", "silero") if silero_file() else ("webrtc",):
        without, with_it = (num_triggers(open_detector(name), frames) for frames in (raw, clean))
        print(f"{name}: {without} triggers without cancellation, {with_it} with it")
        assert without >= 1
        assert with_it == 0
