"""Echo cancellation: the microphone's sound without the loudspeaker's.

software      WebRTC's AEC3: the user can interrupt; needs the extra `echo`
half-duplex   the microphone is muted while the loudspeaker plays, and 300 ms longer: the user
              cannot interrupt
none          for a headset, or a speakerphone that cancels echo itself
"""

from __future__ import annotations

import logging
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.features import RATE_HZ

Array = NDArray[np.float32]

EchoMode = Literal["software", "half-duplex", "none"]

_BLOCK_SAMPLES = RATE_HZ // 100  # AEC3 takes 10 ms at a time
_HOLD_MS = 300  # the loudspeaker's buffer and the room's reverberation

log = logging.getLogger(__name__)


class EchoCanceller(Protocol):
    """Takes one stream of frames, in order."""

    def process(self, mic: Array, far: Array) -> Array:
        """Return 20 ms of microphone, (320,) at 16 kHz, without the echo of `far`: the sound that
        the loudspeaker was given in the same 20 ms, (320,)."""


class WebRtcEchoCanceller:
    """AEC3: estimates the echo's delay itself; its output is 8 ms late."""

    def __init__(self) -> None:
        """Raises SettingsError if `pywebrtc-audio` is not installed."""
        try:
            import pywebrtc_audio
        except ImportError as error:
            raise SettingsError(
                f"echo cancellation needs pywebrtc-audio ({error}); "
                "pip install 'deeptalk-edge[echo]'"
            ) from error
        self._canceller = pywebrtc_audio.EchoCanceller(RATE_HZ, 1)

    def process(self, mic: Array, far: Array) -> Array:
        # The binding reads arrays as if they were contiguous, whatever their strides.
        mic_blocks = np.ascontiguousarray(mic).reshape(-1, _BLOCK_SAMPLES)
        far_blocks = np.ascontiguousarray(far).reshape(-1, _BLOCK_SAMPLES)
        pairs = zip(mic_blocks, far_blocks, strict=True)
        return np.concatenate([self._canceller.process(near, played) for near, played in pairs])


class HalfDuplexGate:
    """Mutes the microphone while the loudspeaker plays and `_HOLD_MS` longer."""

    def __init__(self) -> None:
        self._muted_samples = 0

    def process(self, mic: Array, far: Array) -> Array:
        if far.any():
            self._muted_samples = _HOLD_MS * RATE_HZ // 1000 + len(mic)
        self._muted_samples = max(self._muted_samples - len(mic), 0)
        return np.zeros_like(mic) if self._muted_samples else mic


class NoCanceller:
    """Returns the microphone's sound unchanged."""

    def process(self, mic: Array, far: Array) -> Array:
        return mic


def open_canceller(mode: EchoMode = "software") -> EchoCanceller:
    """Open the canceller of this mode; `software` falls back to half-duplex with a warning if its
    package is not installed."""
    if mode == "none":
        return NoCanceller()
    if mode == "software":
        try:
            return WebRtcEchoCanceller()
        except SettingsError as error:
            log.warning(
                "%s; half-duplex instead: the microphone is deaf while the answer plays", error
            )
    return HalfDuplexGate()
