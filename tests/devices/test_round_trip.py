"""Clicks of the loudspeaker are found in the microphone; one that hears none is a reason."""

from __future__ import annotations

import numpy as np
import pytest

from deeptalk_edge.devices.round_trip import click, sound_round_trip_ms
from deeptalk_edge.errors import DeviceLost
from deeptalk_edge.runtime.audio.virtual_port import EchoPath, VirtualPort, recording

NOISE = np.random.default_rng(3).standard_normal(16_000 * 12).astype(np.float32)


def room(*, noise: float = 0.0, echo: EchoPath | None = None) -> VirtualPort:
    return VirtualPort(recording(np.float32(noise) * NOISE), echo=echo)


@pytest.mark.parametrize("delay_ms", [20, 60, 500])
def test_the_way_is_the_rooms_delay_within_a_frame(delay_ms: int) -> None:
    found = sound_round_trip_ms(room(echo=EchoPath(gain=0.3, delay_ms=delay_ms)))
    assert found.value is not None
    assert delay_ms <= found.value <= delay_ms + 20


def test_a_click_is_found_in_noise_as_loud_as_itself() -> None:
    quiet = float(np.sqrt(np.mean((0.3 * click(16_000)) ** 2)))
    found = sound_round_trip_ms(room(noise=quiet, echo=EchoPath(gain=0.3, delay_ms=100)))
    assert found.value == pytest.approx(110, abs=11)


def test_noise_alone_is_no_click() -> None:
    found = sound_round_trip_ms(room(noise=0.1))
    assert found.value is None
    assert "heard 0 of 3 clicks" in str(found.why)


def test_a_click_that_comes_later_than_we_wait_is_not_heard() -> None:
    found = sound_round_trip_ms(room(echo=EchoPath(gain=0.3, delay_ms=1300)))
    assert found.value is None


def test_a_device_that_does_not_open_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    port = room()

    def refuse() -> None:
        raise DeviceLost("no microphone is there")

    monkeypatch.setattr(port, "open", refuse)
    assert sound_round_trip_ms(port).why == "no microphone is there"
