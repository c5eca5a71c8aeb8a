"""What a port on PyAudio counts; it is played and recorded on a virtual card in sound_card/."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deeptalk_edge.runtime.audio.ports import PortCounters
from deeptalk_edge.runtime.audio.pyaudio_port import PyAudioPort


def device(**counts: int) -> Any:
    """An opened device that has counted so much; there need be no sound system."""
    source = SimpleNamespace(
        num_dropped=counts["dropped"], num_overruns=counts["overruns"], num_callbacks=7
    )
    sink = SimpleNamespace(num_callbacks=9, audible=lambda: 0)
    return SimpleNamespace(input=source, output=sink, close=lambda: None)


def test_counts_go_on_over_a_device_that_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    port = PyAudioPort()
    assert port.counters() == PortCounters()
    for times in (1, 2):
        monkeypatch.setattr(port, "_device", device(dropped=320, overruns=2))
        counted = port.counters()
        assert (counted.dropped_in, counted.overruns) == (320 * times, 2 * times)
        assert (counted.callbacks_in, counted.callbacks_out) == (7 * times, 9 * times)
        port.close()
        assert port.counters() == counted
