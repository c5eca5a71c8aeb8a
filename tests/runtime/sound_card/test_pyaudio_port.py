"""Real PyAudio streams on a private sound card."""

from __future__ import annotations

import time

import numpy as np
import pytest

from deeptalk_edge.errors import DeviceLost
from deeptalk_edge.runtime.audio.pyaudio_port import DeviceSettings, PyAudioPort
from tests.runtime.sound_card.conftest import Card
from tests.runtime.sound_card.trials import on_a_steady_machine
from tests.runtime.sound_card.warbles import assert_intact, find, hear, warble


@on_a_steady_machine
def test_the_microphone_records_every_sample_of_speech(card: Card, port: PyAudioPort) -> None:
    said = warble(4.0, 16000)
    port.open()
    hear(port, 0.3)
    card.say(said)
    heard, _ = hear(port, 5.5)
    assert_intact(said, heard, 16000)
    assert port.counters().dropped_in == 0


@on_a_steady_machine
def test_the_loudspeaker_plays_every_sample_and_the_callbacks_come(
    card: Card, port: PyAudioPort
) -> None:
    answer = warble(1.9, 24000)
    port.open()
    hear(port, 0.5)
    before = port.counters()
    listener = card.listen()
    start_s = time.perf_counter()
    port.write(answer)
    port.finish()
    hear(port, 4.0)
    seconds = time.perf_counter() - start_s
    heard = listener.stop()
    assert_intact(answer[240:], heard, 24000)  # its first 5 ms fade in
    assert port.handed == port.audible() == len(answer)
    after = port.counters()
    assert after.callbacks_in - before.callbacks_in >= 0.9 * 50 * seconds
    assert after.callbacks_out - before.callbacks_out >= 0.9 * 50 * seconds
    assert after.underruns - before.underruns == 0


@on_a_steady_machine
def test_the_position_that_a_flush_returns_is_the_heard_one(card: Card, port: PyAudioPort) -> None:
    answer = warble(1.9, 24000)
    port.open()
    hear(port, 0.5)
    listener = card.listen()
    port.write(answer)
    hear(port, 0.7)
    handed = port.flush()
    hear(port, 0.6)
    heard = listener.stop()
    assert 0.3 * 24000 < handed < 1.3 * 24000
    assert port.handed == port.audible() == handed
    place, _, _ = find(answer[240 : handed - 240], heard)
    end = int(np.flatnonzero(np.abs(heard) > 1e-4)[-1]) + 1
    print(f"handed {handed}, heard {end - (place - 240)}")
    assert abs(end - (place - 240) - handed) <= 48


@on_a_steady_machine
def test_a_sound_comes_back_within_150_ms(card: Card) -> None:
    port = PyAudioPort(DeviceSettings(input_name="vmon", output_name="vspk", lost_after_ms=3000))
    port.open()
    hear(port, 1.0)
    round_trips_ms, after_far_ms = [], []
    for _ in range(5):
        port.write(warble(0.2, 24000))
        port.finish()
        mic, far = hear(port, 0.6)
        round_trips_ms.append(float(np.flatnonzero(np.abs(mic) > 0.02)[0]) / 16)
        after_far_ms.append(round_trips_ms[-1] - float(np.flatnonzero(np.abs(far) > 0.02)[0]) / 16)
    port.close()
    print("round trips", round_trips_ms, "after the far end", after_far_ms)
    assert np.median(round_trips_ms) < 150
    # An echo before its far end could not be cancelled.
    assert min(after_far_ms) > 0


@pytest.mark.parametrize(("input_hz", "output_hz"), [(48000, 48000), (44100, 44100)])
@on_a_steady_machine
def test_a_device_of_another_rate_is_resampled(card: Card, input_hz: int, output_hz: int) -> None:
    port = PyAudioPort(
        DeviceSettings(
            input_name="vmic", output_name="vspk", input_rate_hz=input_hz, output_rate_hz=output_hz
        )
    )
    port.open()
    try:
        hear(port, 0.5)
        listener = card.listen()
        answer, said = warble(1.5, 24000), warble(1.5, 16000, seed=1)
        port.write(answer)
        port.finish()
        card.say(said)
        mic, _ = hear(port, 3.0)
        assert_intact(answer[240:], listener.stop(), 24000)
        assert_intact(said, mic, 16000)
        assert port.handed == len(answer)
    finally:
        port.close()


@on_a_steady_machine
def test_closing_takes_less_than_200_ms_even_while_it_speaks(card: Card, port: PyAudioPort) -> None:
    for _ in range(3):
        port.open()
        port.write(warble(1.9, 24000))
        hear(port, 0.3)
        start_s = time.perf_counter()
        port.close()
        assert time.perf_counter() - start_s < 0.2


@on_a_steady_machine
def test_a_dead_sound_daemon_is_noticed_and_both_streams_are_reopened(card: Card) -> None:
    port = PyAudioPort(DeviceSettings(input_name="vmic", output_name="vspk"))
    port.open()
    port.write(warble(1.9, 24000))
    hear(port, 0.5)
    killed_s = time.perf_counter()
    card.kill_daemon()
    with pytest.raises(DeviceLost, match="gave no sign"):
        hear(port, 5)
    assert time.perf_counter() - killed_s < 1.0
    assert 0.2 * 24000 < port.audible() <= port.handed < 1.2 * 24000
    with pytest.raises(DeviceLost, match="'vmic'"):
        port.open()
    with pytest.raises(DeviceLost, match="not open"):
        port.read(0.1)
    back_s = time.perf_counter()
    card.start()
    port.open()
    assert port.handed == 0
    before = port.counters()
    hear(port, 0.4)
    assert port.counters().callbacks_out > before.callbacks_out
    assert time.perf_counter() - back_s < 5.0
    assert port.counters().restarts == 1
    port.close()


def test_an_unknown_name_is_refused_with_the_list_of_devices(card: Card) -> None:
    port = PyAudioPort(DeviceSettings(input_name="no such thing"))
    with pytest.raises(DeviceLost, match=r"'no such thing' is not there; there are: .*'vmic'"):
        port.open()
