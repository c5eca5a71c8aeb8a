"""Sound devices by name: list them, choose one, choose the format to open it with.

A name is matched as a whole first, then as a part, ignoring case. A name that fits several devices
is refused. Devices with equal names are numbered, `NAME #2`, in PortAudio's order. Indices are
never kept, because they change when a device is plugged in.
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

# Functions of the sound libraries that set their error handlers.
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
    """The device's default rate."""
    is_default_input: bool
    is_default_output: bool

    def channels(self, direction: Direction) -> int:
        return self.num_inputs if direction == "input" else self.num_outputs

    def is_default(self, direction: Direction) -> bool:
        return self.is_default_input if direction == "input" else self.is_default_output


@dataclass(frozen=True, slots=True)
class SoundFormat:
    """Format that a device is opened with."""

    rate_hz: int
    num_channels: int


def open_pyaudio() -> pyaudio.PyAudio:
    """Start PortAudio, which lists the devices as they are now.

    Raises SettingsError if PyAudio is not installed or ALSA's settings are missing, DeviceLost if
    PortAudio does not start.
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
    """Refuse to start without ALSA's settings: PortAudio 19.6 then aborts by an assertion."""
    named = os.environ.get("ALSA_CONFIG_PATH")
    if named and not any(os.access(path, os.R_OK) for path in named.split(":")):
        raise SettingsError(
            f"ALSA_CONFIG_PATH names {named!r}, which cannot be read; correct it or unset it"
        )


def _quieten(*, is_quiet: bool) -> None:
    """Silence ALSA and JACK, which write to stderr about each missing device, unless `-v` is set.

    The handler is a C function that ignores its arguments: a Python function could be called after
    the interpreter has ended.
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
    """Return the name of each device; equal names get a number."""
    total, seen, names = Counter(device.name for device in devices), Counter[str](), []
    for device in devices:
        seen[device.name] += 1
        number = f" #{seen[device.name]}" if total[device.name] > 1 else ""
        names.append(device.name + number)
    return names


def choose_device(
    devices: Sequence[SoundDevice], name: str | None, direction: Direction
) -> SoundDevice:
    """Return the device of this name, or the default device without a name.

    Raises DeviceLost, naming the devices available, if none or more than one fits.
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
    """Return our rate and one channel if the device takes them, else a format that it takes.

    Raises DeviceLost if it takes none.
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
    except OSError:  # PyAudio's error for a missing default device
        return None
    assert isinstance(about, dict)
    return int(about["index"])
