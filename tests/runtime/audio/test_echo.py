"""Echo is cancelled with the package, and gated with a warning without it."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.audio.echo import (
    HalfDuplexGate,
    NoCanceller,
    WebRtcEchoCanceller,
    open_canceller,
)
from tests.runtime.sounds import silence, voice

Array = NDArray[np.float32]


def room(seconds: float, delay_ms: int) -> tuple[Array, Array]:
    """A far end, and the microphone with its echo through a short reverberation."""
    rng = np.random.default_rng(1)
    far = voice(seconds) * (1 + 0.5 * rng.standard_normal(int(seconds * 16000)))
    response = np.exp(-np.arange(2000) / 400) * rng.standard_normal(2000) * 0.05
    delay = delay_ms * 16
    echo = np.pad(np.convolve(far, response), (delay, 0))[: len(far)]
    return far.astype(np.float32), (echo + 1e-3 * rng.standard_normal(len(far))).astype(np.float32)


@pytest.mark.parametrize("delay_ms", [20, 60, 300])
def test_the_echo_is_20_db_down_after_three_seconds_whatever_its_delay(delay_ms: int) -> None:
    pytest.importorskip("pywebrtc_audio")
    far, mic = room(6, delay_ms)
    canceller = WebRtcEchoCanceller()
    pairs = zip(mic.reshape(-1, 320), far.reshape(-1, 320), strict=True)
    clean = np.concatenate([canceller.process(*pair) for pair in pairs])
    late = slice(3 * 16000, None)
    assert np.mean(clean[late] ** 2) < np.mean(mic[late] ** 2) / 100


def test_a_voice_in_the_room_passes() -> None:
    pytest.importorskip("pywebrtc_audio")
    said, canceller = voice(2), WebRtcEchoCanceller()
    clean = np.concatenate([canceller.process(f, silence(0.02)) for f in said.reshape(-1, 320)])
    assert 0.5 < np.mean(clean[16000:] ** 2) / np.mean(said[16000:] ** 2) < 1.5


def test_arrays_with_gaps_in_memory_are_read_as_they_are() -> None:
    pytest.importorskip("pywebrtc_audio")
    far, mic = room(1, 60)
    apart = np.stack([far, -far], axis=1)[:, 0]
    assert not apart.flags.c_contiguous
    one, other = WebRtcEchoCanceller(), WebRtcEchoCanceller()
    for start in range(0, len(far), 320):
        part = slice(start, start + 320)
        np.testing.assert_array_equal(
            one.process(mic[part], apart[part]), other.process(mic[part], far[part])
        )


def test_the_gate_mutes_while_the_loudspeaker_plays_and_300_ms_longer() -> None:
    gate, mic = HalfDuplexGate(), voice(0.02)
    assert gate.process(mic, silence(0.02)).any()
    assert not gate.process(mic, voice(0.02)).any()
    heard = [gate.process(mic, silence(0.02)).any() for _ in range(20)]
    assert heard == [False] * 14 + [True] * 6


def test_without_the_package_the_gate_is_chosen_and_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pywebrtc_audio", None)
    with caplog.at_level(logging.WARNING):
        assert isinstance(open_canceller(), HalfDuplexGate)
    assert "deeptalk-edge[echo]" in caplog.text
    assert "half-duplex" in caplog.text
    with pytest.raises(SettingsError, match=r"deeptalk-edge\[echo\]"):
        WebRtcEchoCanceller()


def test_a_headset_needs_no_canceller() -> None:
    canceller = open_canceller("none")
    assert isinstance(canceller, NoCanceller)
    mic = voice(0.02)
    np.testing.assert_array_equal(canceller.process(mic, mic), mic)
