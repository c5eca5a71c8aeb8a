"""A recording is valid at every moment, replaces no file, and never ends a session."""

from __future__ import annotations

import signal
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.errors import AudioError
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES, MicFrame
from deeptalk_edge.runtime.loop.recorder import Recorder
from deeptalk_edge.sound.wav import MAX_BYTES, read_wav
from tests.disks import small_disk
from tests.places import ROOT


def _frame(number: int) -> MicFrame:
    pcm = np.full(FRAME_SAMPLES, number / 1000, np.float32)
    return MicFrame(pcm, -pcm, number * FRAME_SAMPLES)


def _record(directory: Path, num_frames: int, **settings: int) -> None:
    with Recorder(directory, **settings) as recorder:
        for number in range(num_frames):
            recorder.push(_frame(number))


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_second_session_gets_the_next_number(tmp_path: Path) -> None:
    for num_frames in (1, 2, 3):
        _record(tmp_path / "rec", num_frames)
    for num_frames, end in ((1, ""), (2, "-2"), (3, "-3")):
        for name in ("microphone", "loudspeaker"):
            sound = read_wav(tmp_path / "rec" / f"{name}{end}.wav")
            assert len(sound.pcm) == num_frames * FRAME_SAMPLES


def test_an_existing_file_of_a_pair_reserves_its_number(tmp_path: Path) -> None:
    (tmp_path / "loudspeaker.wav").write_bytes(b"mine")
    _record(tmp_path, 1)
    assert _names(tmp_path) == ["loudspeaker-2.wav", "loudspeaker.wav", "microphone-2.wav"]
    assert (tmp_path / "loudspeaker.wav").read_bytes() == b"mine"


def test_a_full_file_continues_in_the_next_without_losing_a_frame(tmp_path: Path) -> None:
    _record(tmp_path, 7, max_bytes=3 * 2 * FRAME_SAMPLES + 1)
    parts = [read_wav(tmp_path / f"microphone{end}.wav").pcm for end in ("", "-2", "-3")]
    assert [len(part) // FRAME_SAMPLES for part in parts] == [3, 3, 1]
    expected = np.concatenate([_frame(number).pcm for number in range(7)])
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-4)


def test_a_session_of_more_than_4_gib_continues_in_the_next_pair(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Recorder(tmp_path) as recorder:
        recorder.push(_frame(0))
        for writer in recorder._pair:  # a hole in the file replaces 37 hours
            writer.num_samples = MAX_BYTES // 2 - FRAME_SAMPLES
        for number in (1, 2):
            recorder.push(_frame(number))
    assert not caplog.records
    for name in ("microphone", "loudspeaker"):
        with wave.open(str(tmp_path / f"{name}.wav")) as file:
            assert file.getnframes() == MAX_BYTES // 2
        assert len(read_wav(tmp_path / f"{name}-2.wav").pcm) == FRAME_SAMPLES


def test_a_session_without_a_frame_leaves_no_file(tmp_path: Path) -> None:
    _record(tmp_path, 0)
    assert _names(tmp_path) == []


def test_both_files_are_valid_after_every_frame(tmp_path: Path) -> None:
    with Recorder(tmp_path) as recorder:
        for number in range(3):
            recorder.push(_frame(number))
            for name in ("microphone", "loudspeaker"):
                with wave.open(str(tmp_path / f"{name}.wav")) as file:
                    assert file.getnframes() == (number + 1) * FRAME_SAMPLES


def test_a_killed_session_leaves_valid_recordings(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "from deeptalk_edge.runtime.audio.ports import MicFrame\n"
        "from deeptalk_edge.runtime.loop.recorder import Recorder\n"
        "recorder, pcm = Recorder(Path(sys.argv[1])), np.zeros(320, np.float32)\n"
        "while True:\n"
        "    recorder.push(MicFrame(pcm, pcm, 0))\n"
        "    print(flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        for _ in range(50):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    lengths = []
    for name in ("microphone", "loudspeaker"):
        with wave.open(str(tmp_path / f"{name}.wav")) as file:
            lengths.append(file.getnframes())
            assert len(file.readframes(file.getnframes())) == 2 * lengths[-1]
    assert min(lengths) >= 50 * FRAME_SAMPLES
    assert max(lengths) - min(lengths) <= FRAME_SAMPLES  # killed between the two writes


def test_a_full_disk_is_one_warning_and_keeps_what_both_files_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", "100k") as disk:
        _record(disk / "rec", 200)  # 256 kB
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "the recording ends here" in caplog.text
        heard, played = (read_wav(disk / "rec" / f"{n}.wav") for n in ("microphone", "loudspeaker"))
        assert len(heard.pcm) == len(played.pcm) > 20 * FRAME_SAMPLES
        assert len(heard.pcm) % FRAME_SAMPLES == 0
        _record(disk / "rec", 1)  # full from the beginning
        assert len(caplog.records) == 2


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AudioError, match="file: cannot be written"):
        Recorder(tmp_path / "file")
