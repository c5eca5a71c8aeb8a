"""The streams of a sound device without hardware: callbacks run on a virtual clock."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import soxr
from numpy.typing import NDArray

from deeptalk_edge.runtime.audio.play_queue import PlayQueue
from deeptalk_edge.runtime.audio.ports import PLAY_RATE_HZ
from deeptalk_edge.runtime.audio.sound_cards import SoundFormat
from deeptalk_edge.runtime.audio.streams import BLOCK_SAMPLES, InputStream, OutputStream
from tests.runtime.sound_card.warbles import find, warble

Array = NDArray[np.float32]

RATES = [8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000, 96000]
STEADY = [rate for rate in RATES if rate % 50 == 0]
AHEAD_S = 0.035  # from a callback to the sound


class Loudspeaker:
    """A device that calls back every 20 ms and is heard `ahead_s` later."""

    def __init__(self, rate_hz: int, num_channels: int = 1, ahead_s: float = AHEAD_S) -> None:
        self.queue = PlayQueue(seconds=3.0, block_samples=BLOCK_SAMPLES)
        self.fmt = SoundFormat(rate_hz, num_channels)
        self.now_s, self._ahead_s = 100.0, ahead_s
        self.output = OutputStream(self.fmt, self.queue, clock=lambda: self.now_s)
        self._played: list[NDArray[np.int16]] = []

    def call_back(self) -> None:
        num_frames = self.fmt.rate_hz // 50
        times = {"current_time": 7.0, "output_buffer_dac_time": 7.0 + self._ahead_s}
        content, _ = self.output.callback(None, num_frames, times, 0)
        wide = np.frombuffer(content, np.int16).reshape(-1, self.fmt.num_channels)
        assert len(wide) == num_frames
        self._played.append(wide)
        self.now_s += num_frames / self.fmt.rate_hz

    @property
    def played(self) -> Array:
        """All sound since the first callback, (N, channels)."""
        return np.concatenate(self._played).astype(np.float32) / np.float32(32767)


def delay_s(content: Array, played: Array, rate_hz: int) -> float:
    """Delay of 24 kHz content in the sound that a device played since its first callback."""
    padded = np.concatenate([np.zeros(2400, np.float32), played[:, 0], np.zeros(2400, np.float32)])
    at_24_khz = soxr.resample(padded, rate_hz, PLAY_RATE_HZ)
    place, likeness, _ = find(content[2400:21600], at_24_khz)
    assert likeness > 0.8  # a device of 8 kHz removes the highest part
    return (place - 2400) / PLAY_RATE_HZ - 2400 / rate_hz


@pytest.mark.parametrize("rate_hz", RATES)
def test_the_heard_position_is_right_within_3_ms_at_every_rate(rate_hz: int) -> None:
    content = warble(1.0, PLAY_RATE_HZ)
    device = Loudspeaker(rate_hz)
    for _ in range(7):
        device.call_back()
    device.queue.write(content)
    began_s = device.now_s + AHEAD_S
    positions = []
    for _ in range(50):
        device.call_back()
        for _ in range(4):  # also between the callbacks
            device.now_s += 0.005
            positions.append((device.now_s - began_s, device.output.audible() / PLAY_RATE_HZ))
        device.now_s -= 0.02
    silent_s = 7 * (rate_hz // 50) / rate_hz
    late_s = delay_s(content, device.played, rate_hz) - silent_s
    for since_s, audible_s in positions:
        true_s = min(max(since_s - late_s, 0.0), 1.0)
        assert abs(audible_s - true_s) < 0.001  # the resampler alone is 2 ms late


@pytest.mark.parametrize("rate_hz", STEADY)
def test_every_callback_takes_one_block(rate_hz: int) -> None:
    device = Loudspeaker(rate_hz)
    device.queue.write(warble(1.0, PLAY_RATE_HZ))
    for count in range(1, 40):
        device.call_back()
        assert device.queue.handed == count * BLOCK_SAMPLES


@pytest.mark.parametrize("rate_hz", [8000, 24000, 44100, 48000])
def test_the_far_end_keeps_a_constant_distance_to_the_played_sound(rate_hz: int) -> None:
    content = warble(1.0, PLAY_RATE_HZ)
    device = Loudspeaker(rate_hz)
    device.queue.write(content)
    far = []
    for _ in range(50):
        device.call_back()
        far.append(device.output.far_frame(num_waiting=0))
    far_s = delay_s(content, np.concatenate(far)[:, None], 16000)
    played_s = delay_s(content, device.played, rate_hz)
    assert far_s == pytest.approx(0.002, abs=1e-4)
    assert abs(far_s - played_s) < 0.0025
    pieces = [warble(1.0, PLAY_RATE_HZ)[start : start + 4800] for start in (2400, 9600, 16800)]
    places = [find(piece, soxr.resample(np.concatenate(far), 16000, 24000))[0] for piece in pieces]
    assert np.ptp(np.array(places) - [2400, 9600, 16800]) <= 1  # no step on the way


def test_samples_beyond_full_scale_are_clipped_not_wrapped() -> None:
    for rate_hz in (24000, 48000):
        device = Loudspeaker(rate_hz, num_channels=2)
        device.queue.write(np.tile(np.repeat(np.array([1.7, -1.7], np.float32), 120), 10))
        for _ in range(5):
            device.call_back()
        loud = device.played[rate_hz // 100 : rate_hz // 12]
        high, low = loud[: rate_hz // 250].max(), loud[: rate_hz // 100].min()
        assert high == pytest.approx(1.0, abs=1e-4)
        assert low == pytest.approx(-1.0, abs=1e-4)
        # Between the edges each stretch of 5 ms keeps its sign.
        middles = loud[rate_hz // 400 :: rate_hz // 200, 0]
        assert set(np.sign(middles[:6])) == {1.0, -1.0}
        assert np.all(np.abs(middles[:6]) > 0.99)
        np.testing.assert_array_equal(loud[:, 0], loud[:, 1])


def test_a_device_with_a_delay_in_the_past_counts_as_heard_at_once() -> None:
    device = Loudspeaker(PLAY_RATE_HZ, ahead_s=-7.0)
    device.queue.write(warble(0.1, PLAY_RATE_HZ))
    device.call_back()
    assert device.output.audible() == pytest.approx(480, abs=1)
    device.now_s -= 0.01
    assert device.output.audible() == pytest.approx(240, abs=1)


def test_a_device_with_an_absurd_delay_counts_as_heard_after_a_second() -> None:
    device = Loudspeaker(PLAY_RATE_HZ, ahead_s=1e9)
    device.queue.write(warble(0.1, PLAY_RATE_HZ))
    for _ in range(51):
        assert device.output.audible() == 0
        device.call_back()
    assert device.output.audible() == pytest.approx(480, abs=1)


def test_a_silent_device_plays_nothing_more() -> None:
    device = Loudspeaker(PLAY_RATE_HZ)
    device.queue.write(warble(1.0, PLAY_RATE_HZ))
    for _ in range(10):
        device.call_back()
    device.now_s += 60
    # Heard: what the last callback, 40 ms before, allows.
    assert device.output.audible() == round((9 * 0.02 + 0.04 - AHEAD_S) * PLAY_RATE_HZ)


class Microphone:
    """A device that delivers 20 ms at a time."""

    def __init__(self, rate_hz: int, num_channels: int = 1) -> None:
        self.fmt = SoundFormat(rate_hz, num_channels)
        self.input = InputStream(self.fmt)
        self.heard: list[Array] = []

    def bring(self, wide: Array, status: int = 0) -> None:
        """Samples (N, channels)."""
        content = np.rint(wide * 32767).astype(np.int16).tobytes()
        self.input.callback(content, len(wide), {}, status)

    def listen(self) -> int:
        """Read all frames; returns their number."""
        num_before = len(self.heard)
        while (frame := self.input.frame(0.0)) is not None:
            self.heard.append(frame)
        return len(self.heard) - num_before


@pytest.mark.parametrize("rate_hz", STEADY)
def test_each_block_of_the_microphone_is_one_frame_within_3_ms(rate_hz: int) -> None:
    said = warble(1.0, rate_hz)
    microphone = Microphone(rate_hz)
    counts: list[int] = []
    for block in np.split(said, 50):
        microphone.bring(block[:, None])
        counts.append(microphone.listen())
    assert counts == [1] * 50
    assert microphone.input.num_samples == 16000
    heard = np.concatenate(microphone.heard)
    at_24_khz = soxr.resample(said, rate_hz, PLAY_RATE_HZ)
    late_s = delay_s(at_24_khz, heard[:, None], 16000)
    assert late_s == pytest.approx(0.0 if rate_hz == 16000 else 0.002, abs=1e-4)


def test_the_first_callback_of_a_device_may_take_two_seconds() -> None:
    fmt, queue = SoundFormat(48000, 1), PlayQueue(seconds=1.0, block_samples=BLOCK_SAMPLES)
    for stream in (InputStream(fmt, lambda: 100.0), OutputStream(fmt, queue, lambda: 100.0)):
        assert stream.last_s == 102.0


def test_a_stereo_microphone_in_antiphase_is_heard() -> None:
    said = warble(0.4, 48000)
    microphone = Microphone(48000, num_channels=2)
    for block in np.split(said, 20):
        microphone.bring(np.stack([block, -block], axis=1))
    microphone.listen()
    heard = np.concatenate(microphone.heard)
    assert find(soxr.resample(said, 48000, 16000)[1600:4800], heard)[1] > 0.99


def test_a_late_reader_gets_the_newest_samples_and_lost_ones_are_counted_at_16_khz() -> None:
    microphone = Microphone(48000, num_channels=2)
    for number in range(800):  # 16 s; the ring holds 15
        microphone.bring(np.full((960, 2), number / 1000, np.float32))
    microphone.listen()
    assert len(microphone.heard) == 750
    assert microphone.input.num_dropped == 16000
    assert microphone.input.num_samples == 16 * 16000
    assert microphone.heard[-1][-1] == pytest.approx(799 / 1000, abs=1e-3)


def test_an_overflow_that_the_device_reports_is_counted() -> None:
    microphone = Microphone(16000)
    microphone.bring(np.zeros((320, 1), np.float32), status=2)
    microphone.bring(np.zeros((320, 1), np.float32), status=4)
    assert (microphone.input.num_overruns, microphone.input.num_callbacks) == (1, 2)


class Stairs(Loudspeaker):
    """A device whose block n is a constant made from n."""

    def __init__(self) -> None:
        super().__init__(PLAY_RATE_HZ)
        self.queue.write(np.repeat(np.arange(150, dtype=np.float32) / 200, BLOCK_SAMPLES))

    def far_block(self) -> int:
        """Number of the block in the far end's next frame."""
        return round(float(self.output.far_frame(num_waiting=0)[-1]) * 200)


def test_the_far_end_starts_with_the_newest_block() -> None:
    device = Stairs()
    assert device.far_block() == 0  # the loudspeaker has got nothing yet
    for _ in range(5):
        device.call_back()
    assert device.far_block() == 4
    device.call_back()
    assert device.far_block() == 5


@pytest.mark.parametrize("num_waiting", [0, 1, 3])
def test_the_far_end_starts_with_the_microphones_oldest_block(num_waiting: int) -> None:
    device = Stairs()
    for _ in range(5):
        device.call_back()
    first = device.output.far_frame(num_waiting=num_waiting)
    assert round(float(first[-1]) * 200) == 4 - num_waiting


@pytest.mark.parametrize(("num_waiting", "waits"), [(0, True), (2, True), (3, False)])
def test_a_lagging_reader_does_not_wait_for_the_far_end(
    num_waiting: int, waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(threading.Event, "wait", lambda event, seconds: waited.append(seconds))
    device = Stairs()
    for _ in range(2 + num_waiting):
        device.call_back()
    for _ in range(2 + num_waiting):
        device.far_block()
    waited.clear()  # waits of the far end's start
    device.output.far_frame(num_waiting=num_waiting)
    assert bool(waited) is waits


def test_a_far_end_that_is_sometimes_ahead_loses_no_block() -> None:
    device = Stairs()
    device.call_back()
    assert device.far_block() == 0
    blocks = []
    for number in range(100):
        for _ in range(4 if number % 20 == 0 else 0 if number % 20 < 4 else 1):
            device.call_back()
        blocks.append(device.far_block())
    assert blocks == list(range(1, 101))


def test_a_far_end_that_is_ahead_for_a_whole_second_is_cut() -> None:
    device = Stairs()
    device.call_back()
    assert device.far_block() == 0
    for _ in range(4):
        device.call_back()
    behind = []
    for number in range(5, 125):
        device.call_back()
        behind.append(number - device.far_block())
    assert (behind[0], behind[48], behind[-1]) == (4, 4, 2)
