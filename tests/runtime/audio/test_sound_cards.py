"""Devices are chosen by name and opened in a format that they support."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deeptalk_edge.errors import DeviceLost, SettingsError
from deeptalk_edge.runtime.audio.pyaudio_port import DeviceSettings, PyAudioPort
from deeptalk_edge.runtime.audio.sound_cards import (
    SoundDevice,
    SoundFormat,
    choose_device,
    choose_format,
    open_pyaudio,
)
from tests.runtime.sounds import voice

MICROPHONE = SoundDevice(
    index=3,
    name="USB Audio: Mic",
    num_inputs=2,
    num_outputs=0,
    rate_hz=44100,
    is_default_input=True,
    is_default_output=False,
)
SPEAKER = replace(
    MICROPHONE,
    index=5,
    name="USB Audio",
    num_inputs=0,
    num_outputs=6,
    is_default_input=False,
    is_default_output=True,
)
HEADSET = replace(MICROPHONE, index=7, name="Headset", num_outputs=2, is_default_input=False)
ALL = [MICROPHONE, SPEAKER, HEADSET]


@pytest.mark.parametrize(
    ("name", "direction", "found"),
    [
        (None, "input", MICROPHONE),
        (None, "output", SPEAKER),
        ("headset", "input", HEADSET),
        ("mic", "input", MICROPHONE),
        ("usb audio", "output", SPEAKER),
        ("USB Audio", "input", MICROPHONE),
    ],
)
def test_a_device_is_found_by_name_or_part_of_it(
    name: str | None, direction: str, found: SoundDevice
) -> None:
    assert choose_device(ALL, name, direction) is found  # type: ignore[arg-type]


def test_a_whole_name_is_preferred_to_a_part() -> None:
    longer = replace(SPEAKER, index=1, name="USB Audio #2")
    assert choose_device([longer, SPEAKER], "USB Audio", "output") is SPEAKER


def test_an_ambiguous_name_is_refused() -> None:
    with pytest.raises(DeviceLost, match="several fit: 'USB Audio', 'Headset'; give more"):
        choose_device(ALL, "", "output")


ARRAY, OTHER = (replace(HEADSET, name=name) for name in ("USB Array", "USB Headset"))
ARRAYS = [ARRAY, OTHER, replace(ARRAY, index=9)]


@pytest.mark.parametrize(
    ("name", "fitting"),
    [
        ("usb", "'USB Array #1', 'USB Headset', 'USB Array #2'"),
        ("USB array", "'USB Array #1', 'US"),
    ],
)
def test_a_name_that_fits_three_devices_is_refused(name: str, fitting: str) -> None:
    with pytest.raises(DeviceLost, match=f"several fit: {fitting}"):
        choose_device(ARRAYS, name, "input")


def test_devices_with_equal_names_are_numbered() -> None:
    assert choose_device(ARRAYS, "usb array #2", "input") is ARRAYS[2]
    assert choose_device(ARRAYS, "array #1", "input") is ARRAYS[0]
    taken = [*ARRAYS, replace(ARRAY, index=11, name="USB Array #2")]
    with pytest.raises(DeviceLost, match="several fit"):
        choose_device(taken, "USB Array #2", "input")


def test_an_absent_device_is_refused_with_the_list_of_devices() -> None:
    with pytest.raises(DeviceLost, match=r"output device 'HDMI' is not there; there are: 'USB Au"):
        choose_device(ALL, "HDMI", "output")
    with pytest.raises(DeviceLost, match="the default input device is not there; there are: none"):
        choose_device([SPEAKER], None, "input")


@pytest.mark.parametrize(
    ("takes", "found"),
    [
        ({(16000, 1), (48000, 2)}, (16000, 1)),
        ({(16000, 2), (48000, 1)}, (16000, 2)),
        ({(44100, 1), (48000, 2)}, (48000, 2)),
        ({(44100, 2)}, (44100, 2)),
    ],
)
def test_our_rate_and_one_channel_are_tried_first(
    takes: set[tuple[int, int]], found: tuple[int, int]
) -> None:
    chosen = choose_format(
        MICROPHONE, "input", 16000, lambda fmt: (fmt.rate_hz, fmt.num_channels) in takes
    )
    assert chosen == SoundFormat(*found)


def test_a_device_that_takes_nothing_is_named() -> None:
    with pytest.raises(DeviceLost, match="'Headset' opens neither at 24000 Hz nor at its own"):
        choose_format(HEADSET, "output", 24000, lambda fmt: False)


@pytest.mark.parametrize(
    "wrong", [{"input_rate_hz": 4000}, {"output_rate_hz": 24001}, {"queue_s": 0}]
)
def test_invalid_device_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match=next(iter(wrong))):
        DeviceSettings(**wrong)  # type: ignore[arg-type]


def test_a_port_that_was_never_opened_refuses_reads_and_closes_without_an_error() -> None:
    port = PyAudioPort()
    with pytest.raises(DeviceLost, match="not open"):
        port.read(0)
    port.write(voice(0.1, 24000))
    assert (port.audible(), port.handed) == (0, 0)
    port.close()


def test_messages_of_alsa_and_jack_are_shown_only_with_v(tmp_path: Path) -> None:
    pytest.importorskip("pyaudio")
    config = tmp_path / "asound.conf"
    config.write_text("pcm.absent { type absent }\n")
    shown = {}
    for flags in ((), ("-v",)):
        done = subprocess.run(
            [sys.executable, "-m", "deeptalk_edge.cli", "sound", *flags],
            env={**os.environ, "ALSA_CONFIG_PATH": str(config), "JACK_NO_START_SERVER": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        shown[flags] = done.stderr
    assert shown[()] == ""
    assert "ALSA lib" in shown["-v",]


def test_missing_settings_of_alsa_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALSA_CONFIG_PATH", str(tmp_path / "gone.conf"))
    with pytest.raises(SettingsError, match=r"gone\.conf.*correct it or unset it"):
        open_pyaudio()
