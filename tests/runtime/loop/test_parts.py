"""Unit tests of the loop's parts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.errors import AudioError
from deeptalk_edge.runtime.audio.ports import MicFrame
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort, recording
from deeptalk_edge.runtime.events import AudioChunk, TextPiece
from deeptalk_edge.runtime.loop.clock import WallClock
from deeptalk_edge.runtime.loop.fake_talker import FakeTalker
from deeptalk_edge.runtime.loop.mic_buffer import MicBuffer
from deeptalk_edge.runtime.loop.model_worker import (
    AnswerFinished,
    Begin,
    Delivery,
    Made,
    ModelWorker,
)
from deeptalk_edge.runtime.loop.playback import Playback
from deeptalk_edge.runtime.loop.recorder import Recorder
from deeptalk_edge.runtime.loop.signals import DiscardAnswer, FinishAnswer
from deeptalk_edge.trace import NO_TRACE, Trace

QUESTION = np.zeros(16000, np.float32)


def frame(value: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.full(320, value, np.float32)


def test_an_utterance_is_cut_to_the_sample_and_dropped_sound_is_silence() -> None:
    mic_buffer = MicBuffer()
    for number in (1, 2, 3, 5):  # the fourth was dropped
        mic_buffer.push(number * 320, frame(number))
    mic_buffer.open(500)
    mic_buffer.push(6 * 320, frame(6))
    pcm = mic_buffer.utterance(6 * 320 + 7, longest=10**6)
    expected = np.repeat([1, 2, 3, 0, 5, 6], [140, 320, 320, 320, 320, 7])
    np.testing.assert_array_equal(pcm, expected)
    np.testing.assert_array_equal(
        mic_buffer.utterance(6 * 320, longest=330), np.repeat([0, 5], [10, 320])
    )


def test_a_mic_buffer_without_an_utterance_keeps_three_seconds() -> None:
    mic_buffer = MicBuffer()
    for number in range(1000):
        mic_buffer.push(number * 320, frame(0))
    assert len(mic_buffer._frames) == 151
    mic_buffer.open(850 * 320)
    for number in range(1000, 2000):
        mic_buffer.push(number * 320, frame(0))
    assert len(mic_buffer.utterance(2000 * 320, longest=10**9)) == 1150 * 320


def test_the_wall_clock_follows_the_earliest_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    clock = WallClock()
    for number, late_s in enumerate([0.05, 0.01, 0.2, 0.03]):
        now_s = 100 + 0.02 * number + late_s
        clock.arrived(320 * (number + 1))
    assert clock.now() == 320 * 4 + 16 * 20  # 30 ms late, where 10 ms are usual


def test_the_wall_clock_follows_a_microphone_that_drifts(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    clock = WallClock()
    for number in range(60 * 60 * 50):
        now_s = 0.02 * number * 1.0002  # 200 ppm: 720 ms in an hour
        clock.arrived(320 * (number + 1))
    assert abs(clock.now() - 320 * 60 * 60 * 50) < 16 * 25


def test_a_trace_holds_spans_counters_and_moments(tmp_path: Path) -> None:
    trace = Trace(max_events=3)
    for _ in range(2):
        with trace.span("row", epoch=3):
            trace.count("queued_ms", 40.0)
    trace.mark("speaking")
    trace.save(tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())
    assert [(e["name"], e["ph"]) for e in content["traceEvents"]] == [
        ("queued_ms", "C"),
        ("row", "X"),
        ("speaking", "i"),
    ]
    assert content["traceEvents"][1]["args"] == {"epoch": 3}
    assert content["traceEvents"][1]["dur"] >= 0
    assert content["otherData"]["dropped_events"] == 2


def test_no_trace_collects_nothing() -> None:
    with NO_TRACE.span("row"):
        NO_TRACE.count("x", 1)
        NO_TRACE.mark("y")
    assert not NO_TRACE._events


def test_a_recording_in_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(AudioError, match="cannot be written"):
        Recorder(tmp_path / "taken")


@pytest.mark.parametrize("budget", [2049, 4000, 4096])
def test_a_worker_stops_when_its_budget_is_spent_and_ignores_orders_for_other_epochs(
    budget: int,
) -> None:
    talker, made = FakeTalker(), list[Delivery]()
    worker = ModelWorker(talker, made.append, trace=NO_TRACE)
    worker.post(Begin(5, QUESTION))
    worker.allow(5, budget)
    while worker.work():
        pass
    assert talker.made_samples == 2 * 2048
    worker.post(DiscardAnswer(4))
    worker.post(FinishAnswer(4, 0))
    worker.allow(4, 10**9)
    while worker.work():
        pass
    assert (talker.num_discarded, talker.history) == (0, [])
    assert talker.made_samples == 2 * 2048
    worker.post(FinishAnswer(5, 2048))
    while worker.work():
        pass
    assert isinstance(made[-1], AnswerFinished)
    assert [type(delivery) for delivery in made[:-1]] == [Made, Made]


def test_playback_is_silent_until_committed_and_resumes_where_it_was_paused() -> None:
    port = VirtualPort(recording(np.zeros(16000, np.float32)), device_ms=0)
    port.open()
    playback = Playback(0, port)
    playback.add(TextPiece("hi"))
    playback.add(AudioChunk(np.linspace(1 / 48000, 1, 48000, dtype=np.float32)))
    assert playback.send() == []
    playback.is_committed = playback.is_written = True
    assert sum(chunk.pcm.size for chunk in playback.send()) == 24000  # at most a second is queued
    for _ in range(10):
        port.read(0.0)
    assert playback.heard == 4800
    paused_at = playback.pause()
    port.read(0.0)
    assert playback.heard == paused_at == 4800 + 120  # the fade counts as heard
    assert playback.send() == []
    playback.resume()
    assert playback.send()[0].pcm[0] == pytest.approx((paused_at + 1) / 48000)
    while not playback.is_heard:
        playback.send()
        port.read(0.0)
    assert playback.heard == 48000
    assert port.counters().underruns == 0


@pytest.mark.parametrize("num_blocks", [1, 7, 40])
def test_playback_of_many_small_chunks_resumes_where_it_was_heard(num_blocks: int) -> None:
    played: list[np.ndarray[tuple[int], np.dtype[np.float32]]] = []
    port = VirtualPort(recording(QUESTION), device_ms=0, on_played=played.append)
    port.open()
    playback = Playback(0, port)
    sound = np.linspace(1 / 48000, 1, 48000, dtype=np.float32)
    for chunk in np.split(sound, 240):  # most of the sent chunks are not heard yet
        playback.add(AudioChunk(chunk))
    playback.is_committed = playback.is_written = True
    for _ in range(num_blocks):
        playback.send()
        port.read(0.0)
    paused_at = playback.pause()
    assert paused_at == num_blocks * 480 + 120
    port.read(0.0)
    playback.resume()
    while not playback.is_heard:
        playback.send()
        port.read(0.0)
    heard = np.concatenate(played)
    silent = 480 - 120  # between the end of the fade and the resumed block
    np.testing.assert_array_equal(
        np.delete(heard, slice(paused_at, paused_at + silent))[paused_at + 120 : 48000],
        sound[paused_at + 120 :],
    )


def test_playback_counts_only_its_own_samples() -> None:
    port = VirtualPort(recording(QUESTION), device_ms=0)
    port.open()
    for epoch in range(3):
        playback = Playback(epoch, port)
        playback.add(AudioChunk(np.ones(960, np.float32)))
        playback.is_committed = playback.is_written = True
        playback.send()
        for block in range(2):
            assert playback.heard == playback.audible == 480 * block
            port.read(0.0)
        assert playback.is_heard


@pytest.mark.parametrize("device_ms", [0, 80])
def test_playback_counts_as_heard_when_the_device_has_played_it(
    device_ms: int,
) -> None:
    port = VirtualPort(recording(QUESTION), device_ms=device_ms)
    port.open()
    playback = Playback(0, port)
    playback.add(AudioChunk(np.ones(960, np.float32)))
    playback.is_committed = playback.is_written = True
    playback.send()
    heard_ms = next(ms for ms in range(20, 1000, 20) if port.read(0.0) and playback.is_heard)
    assert playback.heard == 960
    assert heard_ms == 40 + device_ms


def test_a_recording_is_two_files_of_one_length(tmp_path: Path) -> None:
    silent = np.zeros(320, np.float32)
    with Recorder(tmp_path / "session") as recorder:
        recorder.push(MicFrame(silent, silent, 0))
    assert sorted(path.name for path in (tmp_path / "session").iterdir()) == [
        "loudspeaker.wav",
        "microphone.wav",
    ]


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys, deeptalk_edge; print('numpy' in sys.modules, deeptalk_edge.Conversation)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout.startswith("False <class 'deeptalk_edge.runtime.conversation.Conversation'")
