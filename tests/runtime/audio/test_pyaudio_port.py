"""Counters of a PyAudio port; tests in sound_card/ play and record on a virtual card."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deeptalk_edge.errors import DeviceLost, SettingsError
from deeptalk_edge.runtime.audio.play_queue import PlayQueue
from deeptalk_edge.runtime.audio.ports import PortCounters
from deeptalk_edge.runtime.audio.pyaudio_port import DeviceSettings, PyAudioPort
from deeptalk_edge.runtime.audio.sound_cards import SoundFormat
from deeptalk_edge.runtime.audio.streams import BLOCK_SAMPLES, InputStream, OutputStream


def device(**counts: int) -> Any:
    """An open port with these counters, without a sound system."""
    source = SimpleNamespace(
        num_dropped=counts["dropped"], num_overruns=counts["overruns"], num_callbacks=7
    )
    sink = SimpleNamespace(num_callbacks=9, audible=lambda: 0)
    return SimpleNamespace(input=source, output=sink, close=lambda: None)


class StoppedDevice:
    """The last callback was a minute ago, and `num_waiting` frames are not read yet."""

    def __init__(self, num_frames: int) -> None:
        fmt = SoundFormat(16000, 1)
        queue = PlayQueue(seconds=1.0, block_samples=BLOCK_SAMPLES)
        self.input, self.output = InputStream(fmt), OutputStream(SoundFormat(24000, 1), queue)
        for number in range(num_frames):
            self.input.callback(np.full(320, number, np.int16).tobytes(), 320, {}, 0)
        self.input.last_s = self.output.last_s = time.perf_counter() - 60

        self.num_restarts = 0

    def restart_output(self) -> None:
        self.num_restarts += 1

    def close(self) -> None:
        pass


def test_a_loudspeaker_that_stalls_alone_is_restarted_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port, device = PyAudioPort(), StoppedDevice(0)
    monkeypatch.setattr(port, "_device", device)
    now_s = time.perf_counter()
    device.input.last_s, device.output.last_s = now_s + 9, now_s - 0.6
    assert [port.read(0.0) for _ in range(3)] == [None] * 3
    assert device.num_restarts == port.counters().restarts == 1
    device.output.last_s = now_s - 3.1
    with pytest.raises(DeviceLost, match="output device gave no sign"):
        port.read(0.0)


def test_frames_from_before_a_loss_are_read_first(monkeypatch: pytest.MonkeyPatch) -> None:
    port = PyAudioPort()
    monkeypatch.setattr(port, "_device", StoppedDevice(3))
    frames = [port.read(0.0) for _ in range(3)]
    assert [frame and frame.num_waiting for frame in frames] == [2, 1, 0]
    assert [frame and round(float(frame.pcm[-1]) * 2**15) for frame in frames] == [0, 1, 2]
    with pytest.raises(DeviceLost, match="gave no sign"):
        port.read(0.0)


def test_one_direction_may_be_silent_for_longer_than_both() -> None:
    with pytest.raises(SettingsError, match="one_lost_after_ms = 400"):
        DeviceSettings(lost_after_ms=500, one_lost_after_ms=400)


def test_counters_continue_when_a_device_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    port = PyAudioPort()
    assert port.counters() == PortCounters()
    for times in (1, 2):
        monkeypatch.setattr(port, "_device", device(dropped=320, overruns=2))
        counted = port.counters()
        assert (counted.dropped_in, counted.overruns) == (320 * times, 2 * times)
        assert (counted.callbacks_in, counted.callbacks_out) == (7 * times, 9 * times)
        port.close()
        assert port.counters() == counted
