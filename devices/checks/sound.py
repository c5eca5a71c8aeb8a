"""Whether microphone and loudspeaker open, and at which rate."""

from __future__ import annotations

import time
from collections.abc import Iterator

from deeptalk_edge.devices.finding import Examined, Finding
from deeptalk_edge.errors import EdgeError

_LISTEN_S = 1.0


def sound(examined: Examined) -> Iterator[Finding]:
    """Open the default devices as a live conversation would, and wait for the first frame."""
    if not examined.is_live:
        return
    from deeptalk_edge.runtime.audio.sound_cards import list_devices, open_pyaudio

    try:
        audio = open_pyaudio()
    except EdgeError as error:
        yield Finding(
            check="sound",
            level="warning",
            found=str(error),
            todo="only for a live microphone; WAV files work without",
        )
        return
    try:
        devices = list_devices(audio)
    finally:
        audio.terminate()
    if not any(one.is_default_input for one in devices) or not any(
        one.is_default_output for one in devices
    ):
        yield Finding(
            check="sound",
            level="warning",
            found=f"{len(devices)} devices, without a default microphone and loudspeaker",
            todo="start the sound service, add this user to the group `audio`, or in a container "
            "give it --device /dev/snd",
        )
        return
    yield _opened()


def _opened() -> Finding:
    from deeptalk_edge.runtime.audio.pyaudio_port import DeviceSettings, PyAudioPort

    port = PyAudioPort(DeviceSettings())
    try:
        port.open()
        until_s = time.monotonic() + _LISTEN_S
        frame = None
        while frame is None and time.monotonic() < until_s:
            frame = port.read(0.1)
    except EdgeError as error:
        return Finding(
            check="sound",
            level="error",
            found=str(error),
            todo="`deeptalk-edge sound --meter 5` lists the devices; another program may hold them",
        )
    finally:
        port.close()
    if frame is None:
        return Finding(
            check="sound",
            level="error",
            found=f"the microphone opens, but delivers nothing for {_LISTEN_S:g} s",
            todo="unmute it; `deeptalk-edge sound --meter 5` shows its level",
        )
    return Finding(check="sound", level="ok", found=f"opens; plays at {port.rate_hz} Hz")
