"""Sound devices by name: which there are, which one is meant, and how to open it.

A name is matched whole first, then as a part, letter case ignored; what fits several devices is
refused. Those called the same are numbered, `NAME #2`, in PortAudio's order. An index is never
remembered, as it moves when a device is plugged in.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deeptalk_edge.errors import DeviceLost, SettingsError

if TYPE_CHECKING:
    import pyaudio

Direction = Literal["input", "output"]

# What each sound library is told where to complain.
_COMPLAINTS = {
    "libasound.so.2": ("snd_lib_error_set_handler",),
    "libjack.so.0": ("jack_set_error_function", "jack_set_info_function"),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoundDevice:
    """A sound device as PortAudio describes it."""

    index: int
    name: str
    num_inputs: int
    num_outputs: int
    rate_hz: int
    """Its own rate."""
    is_default_input: bool
    is_default_output: bool

    def channels(self, direction: Direction) -> int:
        return self.num_inputs if direction == "input" else self.num_outputs

    def is_default(self, direction: Direction) -> bool:
        return self.is_default_input if direction == "input" else self.is_default_output


@dataclass(frozen=True, slots=True)
class SoundFormat:
    """How a device is opened."""

    rate_hz: int
    num_channels: int


def open_pyaudio() -> pyaudio.PyAudio:
    """Start PortAudio; the list of devices is as of now.

    Raises SettingsError if PyAudio is not installed or ALSA's settings are not there, DeviceLost
    if PortAudio does not start.
    """
    try:
        import pyaudio
    except ImportError as error:
        raise SettingsError(
            f"live sound needs PyAudio ({error}); apt install portaudio19-dev gcc python3-dev, "
            "then pip install 'deeptalk-edge[sound]'"
        ) from error
    _check_alsa_settings()
    _quieten(is_quiet=not log.isEnabledFor(logging.INFO))
    try:
        return pyaudio.PyAudio()
    except OSError as error:
        raise DeviceLost(f"PortAudio does not start ({error}); check the sound service") from error


def _check_alsa_settings() -> None:
    """PortAudio 19.6 aborts the process where ALSA finds no settings (an assertion of its own)."""
    named = os.environ.get("ALSA_CONFIG_PATH")
    if named and not any(os.access(path, os.R_OK) for path in named.split(":")):
        raise SettingsError(
            f"ALSA_CONFIG_PATH names {named!r}, which cannot be read; correct it or unset it"
        )


def _quieten(*, is_quiet: bool) -> None:
    """ALSA and JACK write to stderr about each device that is not there: that is for `-v` alone.

    They get a C function that ignores what it is given: one of Python's could be called when the
    interpreter has ended.
    """
    ignore = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p) if is_quiet else None
    for library, setters in _COMPLAINTS.items():
        with contextlib.suppress(OSError, AttributeError):  # PortAudio was built without it
            loaded = ctypes.CDLL(library)
            for setter in setters:
                getattr(loaded, setter)(ignore)


def list_devices(audio: pyaudio.PyAudio) -> list[SoundDevice]:
    """Every device, in PortAudio's order."""
    default_input = _default_index(audio.get_default_input_device_info)
    default_output = _default_index(audio.get_default_output_device_info)
    found = []
    for index in range(audio.get_device_count()):
        about = audio.get_device_info_by_index(index)
        device = SoundDevice(
            index=index,
            name=str(about["name"]),
            num_inputs=int(about["maxInputChannels"]),
            num_outputs=int(about["maxOutputChannels"]),
            rate_hz=int(about["defaultSampleRate"]),
            is_default_input=index == default_input,
            is_default_output=index == default_output,
        )
        found.append(device)
    return found


def names_of(devices: Sequence[SoundDevice]) -> list[str]:
    """What each device is called; those of one name have a number behind it."""
    total, seen, names = Counter(device.name for device in devices), Counter[str](), []
    for device in devices:
        seen[device.name] += 1
        number = f" #{seen[device.name]}" if total[device.name] > 1 else ""
        names.append(device.name + number)
    return names


def choose_device(
    devices: Sequence[SoundDevice], name: str | None, direction: Direction
) -> SoundDevice:
    """The device of this name, or the default where there is no name.

    Raises DeviceLost, naming those that there are, if none or more than one fits.
    """
    able = [device for device in devices if device.channels(direction)]
    called = list(zip(names_of(able), able, strict=True))
    if name is None:
        fits = [each for each in called if each[1].is_default(direction)]
    else:
        low = name.casefold()
        fits = [each for each in called if low in (each[0].casefold(), each[1].name.casefold())]
        fits = fits or [each for each in called if low in each[0].casefold()]
    if len(fits) == 1:
        return fits[0][1]
    names = ", ".join(repr(known) for known, _ in fits or called) or "none"
    wanted = f"the default {direction} device" if name is None else f"{direction} device {name!r}"
    if fits:
        raise DeviceLost(f"{wanted}: several fit: {names}; give more of the name")
    raise DeviceLost(f"{wanted} is not there; there are: {names}; plug it in or name another")


def choose_format(
    device: SoundDevice,
    direction: Direction,
    rate_hz: int,
    is_supported: Callable[[SoundFormat], bool],
) -> SoundFormat:
    """Our rate and one channel where the device takes them, else what it takes.

    Raises DeviceLost if it takes nothing.
    """
    most = device.channels(direction)
    for rate in (rate_hz, 48_000, device.rate_hz):
        for num_channels in sorted({1, min(2, most), most}):
            found = SoundFormat(rate, num_channels)
            if is_supported(found):
                return found
    raise DeviceLost(
        f"{direction} device {device.name!r} opens neither at {rate_hz} Hz nor at its own "
        f"{device.rate_hz} Hz in 16 bits; is another program holding it?"
    )


def _default_index(query: Callable[[], object]) -> int | None:
    try:
        about = query()
    except OSError:  # how PyAudio says that there is none
        return None
    assert isinstance(about, dict)
    return int(about["index"])
