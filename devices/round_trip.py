"""How long a sound is on its way from the loudspeaker's queue to the microphone's frames: clicks
are played and found by correlation.

The way is that of a live talk, both devices' buffers and the air included. Time is counted in
microphone samples from the frame that was read when a click was queued, so it is true to 20 ms.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.devices.reading import Reading
from deeptalk_edge.errors import DeviceLost, EdgeError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES, MicFrame, SoundPort

Array = NDArray[np.float32]

_CLICKS, _NEEDED = 3, 2
_SETTLE_FRAMES, _WAIT_FRAMES = 25, 60  # of 20 ms
_CLICK_S = 0.01
_FOUND = 8.0  # times the root mean square of all matches; noise alone reaches 5 in 1.2 s


def sound_round_trip_ms(port: SoundPort) -> Reading[float]:
    """The median over the clicks that were heard; missing, with the reason, if no device opens or
    the microphone does not hear the loudspeaker. Opens the port and closes it."""
    try:
        port.open()
        heard = [_heard_after_ms(port) for _ in range(_CLICKS)]
    except EdgeError as error:
        return Reading(None, str(error))
    finally:
        port.close()
    found = [after_ms for after_ms in heard if after_ms is not None]
    if len(found) < _NEEDED:
        return Reading(
            None,
            f"the microphone heard {len(found)} of {_CLICKS} clicks of the loudspeaker; turn both "
            "up, see `deeptalk-edge sound --meter 5`",
        )
    return Reading(float(np.median(found)))


def click(rate_hz: int) -> Array:
    """10 ms that sweep from 1 to 4 kHz, (N,)."""
    t = np.arange(int(_CLICK_S * rate_hz)) / rate_hz
    sweep = np.sin(2 * np.pi * (1000 * t + 3000 * t**2 / (2 * _CLICK_S)))
    shaped: Array = (0.5 * sweep * np.sin(np.pi * t / _CLICK_S) ** 2).astype(np.float32)
    return shaped


def _heard_after_ms(port: SoundPort) -> float | None:
    _listen(port, _SETTLE_FRAMES)
    port.write(click(port.rate_hz))
    port.finish()
    matches = np.abs(np.correlate(_listen(port, _WAIT_FRAMES), click(RATE_HZ), "valid"))
    place = int(np.argmax(matches))
    if matches[place] <= _FOUND * np.sqrt(np.mean(matches**2)):
        return None
    return place * 1000 / RATE_HZ


def _listen(port: SoundPort, num_frames: int) -> Array:
    """So many frames and those that wait after them, lost samples as zeros, (N,)."""
    frames: list[MicFrame] = []
    num_waiting = 1
    while len(frames) < num_frames or num_waiting:
        frame = port.read(1.0)
        if frame is None:
            raise DeviceLost("the microphone gave no frame for a second")
        frames.append(frame)
        num_waiting = frame.num_waiting
    first = frames[0].start
    pcm = np.zeros(frames[-1].start - first + FRAME_SAMPLES, np.float32)
    for frame in frames:
        pcm[frame.start - first : frame.start - first + FRAME_SAMPLES] = frame.pcm
    return pcm
