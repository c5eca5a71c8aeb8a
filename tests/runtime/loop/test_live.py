"""The loop in its threads, in real time, in short tests."""

from __future__ import annotations

import faulthandler
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge import Conversation
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.cli import main
from deeptalk_edge.errors import DeviceLost, EdgeError
from deeptalk_edge.runtime.audio.echo import NoCanceller
from deeptalk_edge.runtime.audio.end_of_turn import FixedHangover
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort, recording
from deeptalk_edge.runtime.audio.wav_port import WavPort
from deeptalk_edge.runtime.events import SpeechEnded, TurnDone
from deeptalk_edge.runtime.loop.fake_talker import FakeAnswer, FakeTalker
from deeptalk_edge.runtime.loop.live import Hearing, LiveConversation
from deeptalk_edge.runtime.loop.recorder import Recorder
from deeptalk_edge.sound.wav import WavWriter, read_wav
from deeptalk_edge.trace import Trace
from tests.disks import small_disk
from tests.places import ROOT
from tests.runtime.loop.scenes import LoudnessDetector
from tests.runtime.sounds import silence, voice

Array = NDArray[np.float32]


SPOKEN = sorted((ROOT / "checkpoints" / "tiny" / "questions").glob("*.wav"))[0]
HEARING = Hearing(
    detector=LoudnessDetector(), canceller=NoCanceller(), end_of_turn=FixedHangover(500)
)


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def question(tmp_path: Path) -> Path:
    path = tmp_path / "question.wav"
    with WavWriter(path, 16000) as writer:
        writer.write(np.concatenate([silence(0.3), voice(0.7), silence(0.7)]))
    return path


def test_a_spoken_question_gets_a_spoken_answer_in_real_time(
    bundle: Bundle, question: Path, tmp_path: Path
) -> None:
    port = WavPort(question, tmp_path / "answer.wav")
    trace = Trace()
    with (
        Recorder(tmp_path / "session") as recorder,
        Conversation(bundle) as talk,
        talk.listen(port, hearing=HEARING, recorder=recorder, trace=trace) as live,
    ):
        for event in live:
            if isinstance(event, TurnDone):
                live.stop()
                done = event
    assert done.voice is not None
    assert done.voice.was_speculative
    assert done.voice.heard_s == done.metrics.audio_s == pytest.approx(17 * 2048 / 24000)
    assert done.voice.audible_ms is not None
    assert done.voice.audible_ms >= done.voice.hangover_ms == pytest.approx(500, abs=200)
    assert np.count_nonzero(read_wav(tmp_path / "answer.wav").pcm) > 1.4 * 24000
    heard = read_wav(tmp_path / "session" / "microphone.wav")
    played = read_wav(tmp_path / "session" / "loudspeaker.wav")
    assert len(heard.pcm) == len(played.pcm)
    trace.save(tmp_path / "trace.json")
    names = {
        event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    }
    assert names >= {"frame", "encode", "prefill", "row", "speaking", "queued_ms"}


def _spoken(tmp_path: Path) -> Path:
    """As much of a question as this encoder's window holds."""
    with WavWriter(tmp_path / "spoken.wav", 16000) as writer:
        writer.write(read_wav(SPOKEN).pcm[: int(1.3 * 16000)])
    return tmp_path / "spoken.wav"


def test_the_command_talks_through_wav_files(
    bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    microphone = str(_spoken(tmp_path))
    argv = ["run", "--bundle", str(bundle_path), "--mic", "--input-device", microphone]
    argv += ["--output-device", str(tmp_path / "out.wav"), "--hangover", "fixed", "--json"]
    argv += ["--trace", str(tmp_path / "trace.json"), "--no-echo-canceller"]
    assert main(argv) == 0
    (turn,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert turn["turn"] == 1
    assert turn["audible_ms"] >= turn["queued_ms"] > 0
    assert turn["encoder_ms"] > 0
    assert 0.5 < turn["speech_s"] < 1.3
    assert turn["real_time_factor"] == turn["compute_s"] / turn["audio_s"]
    assert (turn["backend"], turn["threads"]) == ("ort", 1)
    assert turn["bundle_sha256"] == Bundle.open(bundle_path).sha256
    assert turn["underruns"] == 0
    assert read_wav(tmp_path / "out.wav").seconds > 2
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"]["dropped_events"] == 0


def _talk(bundle_path: Path, question: Path, *flags: str) -> int:
    argv = ["run", "--bundle", str(bundle_path), "--mic", "--input-device", str(question)]
    return main([*argv, "--hangover", "fixed", "--no-echo-canceller", *flags])


def test_a_loudspeakers_file_on_a_full_disk_ends_the_conversation_clearly(
    bundle_path: Path, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "32k") as disk:
        assert _talk(bundle_path, question, "--output-device", f"{disk}/out.wav") == 1
        assert "out.wav: cannot be written (No space left on device)" in capsys.readouterr().err
        assert read_wav(disk / "out.wav").seconds > 0.2
        assert [path.name for path in disk.iterdir()] == ["out.wav"]


def test_side_outputs_on_a_full_disk_stop_no_conversation(
    bundle_path: Path, tmp_path: Path
) -> None:
    argv = ["run", "--bundle", bundle_path, "--mic", "--input-device", _spoken(tmp_path)]
    argv += ["--hangover", "fixed", "--no-echo-canceller", "--output-device", tmp_path / "out.wav"]
    with small_disk(tmp_path / "disk", "32k") as disk:
        argv += ["--record", disk / "rec", "--trace", disk / "t.json"]
        argv += ["--record-routes", disk / "r.npz"]
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "deeptalk_edge.cli", *map(str, argv)],
                cwd=ROOT,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr
        routes, trace, stdout, recording = sorted(done.stderr.splitlines())
        assert stdout.startswith("WARNING stdout: No space left on device")
        for name, line in (("r.npz", routes), ("t.json", trace), ("microphone.wav", recording)):
            assert f"/{name}: cannot be written (No space left on device)" in line
        assert len(read_wav(disk / "rec" / "microphone.wav").pcm) > 0
    assert read_wav(tmp_path / "out.wav").seconds > 2


def test_a_wrong_flag_after_output_device_leaves_no_file(
    bundle_path: Path, question: Path, tmp_path: Path
) -> None:
    flags = ["--output-device", str(tmp_path / "out.wav"), "--turn-model", "absent.onnx"]
    argv = ["run", "--bundle", str(bundle_path), "--mic", "--input-device", str(question)]
    assert main([*argv, *flags]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["question.wav"]


def test_sigterm_completes_every_file(bundle_path: Path, tmp_path: Path) -> None:
    with WavWriter(tmp_path / "long.wav", 16000) as writer:
        writer.write(silence(60))
    place = tmp_path / "made"
    place.mkdir()
    flags = ["--input-device", str(tmp_path / "long.wav"), "--record", f"{place}/rec"]
    flags += ["--output-device", f"{place}/out.wav", "--trace", f"{place}/trace.json"]
    command = [sys.executable, "-m", "deeptalk_edge.cli", "run", "--bundle", str(bundle_path)]
    with subprocess.Popen([*command, "--mic", *flags], cwd=ROOT, stderr=subprocess.PIPE) as child:
        _wait_until(lambda: (place / "rec" / "microphone.wav").exists())
        _wait_until(lambda: (place / "rec" / "microphone.wav").stat().st_size > 20_000)
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 143
        assert child.stderr is not None
        assert b"Traceback" not in child.stderr.read()
    found = sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file())
    assert found == ["out.wav", "rec/loudspeaker.wav", "rec/microphone.wav", "trace.json"]
    heard, played = (read_wav(place / "rec" / f"{n}.wav") for n in ("microphone", "loudspeaker"))
    assert len(heard.pcm) == len(played.pcm) > 9_000
    assert read_wav(place / "out.wav").seconds == pytest.approx(heard.seconds, abs=0.05)
    assert json.loads((place / "trace.json").read_text())["traceEvents"]


def _wait_until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # the watchdog ends an endless wait
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mic", "--text", "x"], "--text does not go with --mic"),
        (["--mic", "--out", "x.wav"], "--out does not go with --mic"),
        (["--text", "x", "--trace", "x.json"], "--trace needs --mic"),
        (["--text", "x", "--no-speculation"], "--no-speculation needs --mic"),
        (["--text", "x", "--stop-word", "stop"], "--stop-word needs --mic"),
        (["--mic", "--stop-word", "stoppitude"], "found stoppitude"),
        (["--mic", "--output-device", "x.wav"], "--input-device must be one, too"),
        (["--mic", "--input-device", "absent.wav"], "absent.wav"),
        (["--mic", "--turn-model", "absent.onnx"], "absent.onnx"),
    ],
)
def test_invalid_flags_are_refused(
    bundle_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--bundle", str(bundle_path), *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_device_that_cannot_be_opened_is_an_error_at_once() -> None:
    port = VirtualPort(recording(silence(1)))
    port.lose("no such device: 'Anna'")
    live = LiveConversation(FakeTalker(), port, hearing=HEARING)
    with live, pytest.raises(DeviceLost, match="Anna"):
        list(live)


def test_the_model_learns_that_the_user_speaks_before_the_question_ends(question: Path) -> None:
    told: list[str] = []

    class Told(FakeTalker):
        def user_started_speaking(self) -> None:
            told.append("expect")

        def begin(self, question: Array | str) -> FakeAnswer:
            told.append("begin")
            return super().begin(question)

    with LiveConversation(Told(), WavPort(question), hearing=HEARING) as live:
        for event in live:
            if isinstance(event, SpeechEnded):
                live.stop()
    assert told == ["expect", "begin"]


def test_a_bug_in_a_thread_ends_the_conversation_and_is_raised(question: Path) -> None:
    class Broken(FakeTalker):
        def begin(self, question: object) -> object:  # type: ignore[override]
            raise ZeroDivisionError("a bug")

    before = threading.active_count()
    live = LiveConversation(Broken(), WavPort(question, is_realtime=False), hearing=HEARING)  # type: ignore[arg-type]
    with live, pytest.raises(EdgeError, match="ZeroDivisionError: a bug") as told:
        list(live)
    assert isinstance(told.value.__cause__, ZeroDivisionError)
    assert threading.active_count() == before


def test_a_slow_caller_loses_the_oldest_events_and_gets_their_number() -> None:
    live = LiveConversation(FakeTalker(), VirtualPort(recording(silence(1))), hearing=HEARING)
    with live:
        for number in range(5000):
            live._emit(SpeechEnded(float(number)))
        assert live.num_dropped_events == 5000 - 4096
        assert next(iter(live)) == SpeechEnded(904.0)
