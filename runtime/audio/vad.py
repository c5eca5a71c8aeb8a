"""Voice detection: which 20 ms frames hold a voice, and where in a recording the utterance is."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import webrtcvad
from numpy.typing import NDArray

from deeptalk_edge.errors import AudioError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.endpoint import FRAME_MS, EndpointSettings, voiced_span
from deeptalk_edge.runtime.audio.level import loud_dbfs, raise_quiet
from deeptalk_edge.sound.pcm import as_int16
from deeptalk_edge.sound.sound_file import read_sound
from deeptalk_edge.sound.wav import resample

Array = NDArray[np.float32]

FRAME_SAMPLES = RATE_HZ * FRAME_MS // 1000


class VoiceDetector(Protocol):
    """Takes one stream of frames, in order."""

    def is_voiced(self, frame: Array) -> bool:
        """Whether 20 ms of 16 kHz PCM, (320,), contain a voice."""


class WebRtcDetector:
    """WebRTC's detector: 3 us a frame, good in quiet rooms; it takes steady hum for a voice."""

    def __init__(self, aggressiveness: int = 3) -> None:
        """`aggressiveness` is 0 (hears much) to 3 (hears little)."""
        self._vad = webrtcvad.Vad(aggressiveness)

    def is_voiced(self, frame: Array) -> bool:
        return bool(self._vad.is_speech(as_int16(frame).tobytes(), RATE_HZ))


def read_utterance(path: Path) -> Array:
    """Read the utterance of a sound file that holds one, pauses included: 16 kHz mono (N,).
    `loop/utterances.py` finds several.

    Raises AudioError if the file cannot be used or there is no speech in it.
    """
    pcm = raise_quiet(resample(read_sound(path), RATE_HZ).pcm, str(path))
    start, end = find_utterance(pcm, WebRtcDetector())
    return pcm[start:end]


def find_utterance(
    pcm: Array, detector: VoiceDetector, settings: EndpointSettings | None = None
) -> tuple[int, int]:
    """Return the samples [start, end) of the utterance in a 16 kHz recording (N,).

    Raises AudioError if there is no speech in it.
    """
    settings = settings or EndpointSettings()
    # The end may cut a frame: silence fills it up.
    frames = np.pad(pcm, (0, -len(pcm) % FRAME_SAMPLES)).reshape(-1, FRAME_SAMPLES)
    span = voiced_span([detector.is_voiced(frame) for frame in frames], settings)
    if span is None:
        raise AudioError(
            f"no speech heard in {len(pcm) / RATE_HZ:.1f} s of sound, the loudest of it at "
            f"{loud_dbfs(pcm):.0f} dBFS; speak up, move closer, or check the microphone"
        )
    first, end = span
    start = first * FRAME_SAMPLES - settings.pre_roll_ms * RATE_HZ // 1000
    return max(start, 0), min(end * FRAME_SAMPLES + settings.tail_ms * RATE_HZ // 1000, len(pcm))
