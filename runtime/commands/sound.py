"""`deeptalk-edge sound`: the microphones and loudspeakers of this machine, and how loud it is."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # loading these takes longer than `--help` may
    from deeptalk_edge.runtime.audio.sound_cards import SoundDevice

_QUIETEST_DBFS = -60  # the meter's left end
_METER_CHARACTERS = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `sound`."""
    parser.add_argument(
        "--meter",
        type=float,
        metavar="SECONDS",
        help="show for so long what the microphone hears",
    )
    parser.add_argument(
        "--input-device", metavar="NAME", help="for the meter: a name or part of it"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object on stdout")


def main(args: argparse.Namespace) -> int:
    """List the devices, then meter; returns the exit code.

    Raises SettingsError if PyAudio is not installed, DeviceLost if there is no such microphone.
    """
    import dataclasses

    from deeptalk_edge.errors import SettingsError
    from deeptalk_edge.runtime.audio.sound_cards import list_devices, open_pyaudio

    if args.meter is not None and not 0 < args.meter <= 3600:
        raise SettingsError(f"--meter {args.meter}: expected more than 0 and at most 3600 seconds")
    audio = open_pyaudio()
    try:
        devices = list_devices(audio)
    finally:
        audio.terminate()
    if args.json:
        print(json.dumps({"audio": [dataclasses.asdict(device) for device in devices]}))
    else:
        print(_table(devices))
    if args.meter:
        _meter(args.input_device, args.meter)
    return 0


def _table(devices: list[SoundDevice]) -> str:
    if not devices:
        return "no sound devices; is the sound service running, and may this user use it?"
    width = max(len(device.name) for device in devices)
    lines = [f"{'':5} {'name':{width}}  in  out  rate_hz  default"]
    for device in devices:
        defaults = [
            direction
            for direction, is_default in (
                ("input", device.is_default_input),
                ("output", device.is_default_output),
            )
            if is_default
        ]
        lines.append(
            f"{device.index:5} {device.name:{width}}  {device.num_inputs:2}  "
            f"{device.num_outputs:3}  {device.rate_hz:7}  {', '.join(defaults)}".rstrip()
        )
    return "\n".join(lines)


def _meter(name: str | None, seconds: float) -> None:
    """A bar ten times a second, if stderr is a terminal; the summary takes its place at the end."""
    from deeptalk_edge.runtime.audio.endpoint import FRAME_MS
    from deeptalk_edge.runtime.audio.level import level_dbfs, peak_dbfs
    from deeptalk_edge.runtime.audio.pyaudio_port import DeviceSettings, PyAudioPort

    port = PyAudioPort(DeviceSettings(input_name=name))
    port.open()
    loudest_dbfs, is_shown = -float("inf"), sys.stderr.isatty()
    try:
        for count in range(int(seconds * 1000 / FRAME_MS)):
            frame = port.read(1.0)
            if frame is None:
                continue
            loudest_dbfs = max(loudest_dbfs, peak_dbfs(frame.pcm))
            if is_shown and count % 5 == 0:
                level = level_dbfs(frame.pcm)
                filled = round(
                    _METER_CHARACTERS * (1 - max(level, _QUIETEST_DBFS) / _QUIETEST_DBFS)
                )
                bar = "#" * filled + "." * (_METER_CHARACTERS - filled)
                print(f"\r{bar} {level:6.1f} dBFS ", end="", file=sys.stderr, flush=True)
    finally:
        port.close()
    summary = f"peak {loudest_dbfs:.1f} dBFS in {seconds:g} s"
    print(f"\r{summary}{'':40}" if is_shown else summary, file=sys.stderr)
