"""Ports without a device: a virtual clock that reads advance, and WAV files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.errors import DeviceLost
from deeptalk_edge.runtime.audio.virtual_port import EchoPath, VirtualPort, recording
from deeptalk_edge.runtime.audio.wav_port import WavPort
from deeptalk_edge.sound.rates import StreamResampler
from deeptalk_edge.sound.wav import WavWriter, read_wav
from tests.runtime.sounds import silence, voice


def opened(port: VirtualPort) -> VirtualPort:
    port.open()
    return port


def test_the_microphone_hears_the_recording_and_then_silence() -> None:
    pcm = voice(0.05)
    port = opened(VirtualPort(recording(pcm)))
    frames = [port.read(0) for _ in range(4)]
    assert [frame.start for frame in frames if frame] == [0, 320, 640, 960]
    heard = np.concatenate([frame.pcm for frame in frames if frame])
    np.testing.assert_array_equal(heard, np.pad(pcm, (0, 1280 - len(pcm))))


def test_sound_counts_as_heard_when_the_device_has_played_it() -> None:
    port = opened(VirtualPort(recording(silence(1)), device_ms=40))
    port.write(voice(0.03, 24000))
    port.finish()
    positions = []
    for _ in range(4):
        port.read(0)
        positions.append((port.queued, port.handed, port.audible()))
    assert positions == [(240, 480, 0), (0, 720, 0), (0, 720, 480), (0, 720, 720)]


def test_the_echo_has_its_gain_and_delay() -> None:
    port = opened(VirtualPort(recording(silence(1)), echo=EchoPath(gain=0.5, delay_ms=60)))
    port.write(voice(0.5, 24000))
    frames = [port.read(0) for _ in range(30)]
    mic = np.concatenate([frame.pcm for frame in frames if frame])
    far = np.concatenate([frame.far for frame in frames if frame])
    assert np.abs(far).max() > 0.1
    np.testing.assert_allclose(mic[960:], 0.5 * far[:-960], atol=1e-7)


def test_a_lost_port_stays_lost_until_it_is_opened_again() -> None:
    port = opened(VirtualPort(recording(voice(1))))
    port.write(voice(0.1, 24000))
    port.read(0)
    port.lose("unplugged")
    with pytest.raises(DeviceLost, match="unplugged"):
        port.read(0)
    with pytest.raises(DeviceLost, match="unplugged"):
        port.open()
    port.restore()
    with pytest.raises(DeviceLost, match="open it again"):
        port.read(0)
    port.skip(5)
    port.open()
    frame = port.read(0)
    assert frame is not None
    assert frame.start == 0
    np.testing.assert_array_equal(frame.pcm, voice(1)[6 * 320 : 7 * 320])  # time went on
    assert (port.handed, port.queued, port.counters().restarts) == (0, 0, 1)


@pytest.mark.parametrize("is_realtime", [True, False])
def test_a_wav_port_plays_into_one_file_and_writes_the_other(
    tmp_path: Path, is_realtime: bool
) -> None:
    question, answer = tmp_path / "question.wav", tmp_path / "answer.wav"
    with WavWriter(question, 16000) as writer:
        writer.write(voice(0.2))
    port = WavPort(question, answer, is_realtime=is_realtime)
    port.open()
    heard = []
    while not port.is_over:
        frame = port.read(0.1)
        if frame is not None:
            heard.append(frame.pcm)
            if len(heard) == 4:
                port.write(voice(0.1, 24000))
    port.close()
    np.testing.assert_allclose(np.concatenate(heard), voice(0.2), atol=1e-4)
    written = read_wav(answer)
    assert (written.rate_hz, len(written.pcm)) == (24000, 10 * 480)
    assert not written.pcm[: 4 * 480].any()
    assert written.pcm[4 * 480 : 5 * 480].any()


def test_a_realtime_port_gives_nothing_before_its_time(tmp_path: Path) -> None:
    with WavWriter(tmp_path / "question.wav", 16000) as writer:
        writer.write(voice(1))
    port = WavPort(tmp_path / "question.wav")
    port.open()
    assert port.read(0) is not None
    assert port.read(0) is None
    assert port.read(0.1) is not None


RATES = [8000, 16000, 24000, 44100, 48000, 96000]


@pytest.mark.parametrize("from_hz", RATES)
@pytest.mark.parametrize("to_hz", RATES)
def test_every_block_of_a_stream_gives_a_block_at_once_and_2_ms_late(
    from_hz: int, to_hz: int
) -> None:
    def sound(rate_hz: int) -> NDArray[np.float64]:
        t = np.arange(rate_hz) / rate_hz - (0.002 if rate_hz == to_hz != from_hz else 0)
        return np.asarray(sum(np.sin(2 * np.pi * hz * t) for hz in (210, 930, 2710)) / 4)

    resampler = StreamResampler(from_hz, to_hz)
    blocks = [resampler.push(block.astype(np.float32)) for block in np.split(sound(from_hz), 50)]
    assert {len(block) for block in blocks} == {to_hz // 50}
    assert resampler.late_s == (0.002 if from_hz != to_hz else 0)
    stream = np.concatenate(blocks)
    np.testing.assert_allclose(stream[to_hz // 50 :], sound(to_hz)[to_hz // 50 :], atol=1e-3)


@pytest.mark.parametrize("to_hz", [16000, 44100])
def test_a_resampled_stream_does_not_depend_on_its_blocks(to_hz: int) -> None:
    sound = voice(1, 24000)
    whole = StreamResampler(24000, to_hz).push(sound)
    resampler, rng = StreamResampler(24000, to_hz), np.random.default_rng(0)
    cuts = np.sort(rng.integers(0, len(sound), 300))
    pieces = [resampler.push(piece) for piece in np.split(sound, cuts)]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-5)


@pytest.mark.parametrize(("from_hz", "hz"), [(24000, 9000), (48000, 11000), (96000, 40000)])
def test_frequencies_beyond_the_other_rate_are_removed(from_hz: int, hz: int) -> None:
    tone = np.sin(2 * np.pi * hz * np.arange(from_hz) / from_hz).astype(np.float32)
    assert np.abs(StreamResampler(from_hz, 16000).push(tone)[320:]).max() < 10 ** (-65 / 20)
