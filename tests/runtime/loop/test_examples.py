"""The examples for integrators run unchanged, here on a recording."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from deeptalk_edge.runtime.audio.ports import MicFrame
from deeptalk_edge.runtime.audio.wav_port import WavPort
from deeptalk_edge.sound.wav import WavWriter, read_wav
from tests.places import ROOT

SPOKEN = sorted((ROOT / "checkpoints" / "tiny" / "questions").glob("*.wav"))[0]


class Visit(WavPort):
    """A recording; some time after its end, Ctrl-C is sent."""

    def read(self, timeout_s: float) -> MicFrame | None:
        frame = super().read(timeout_s)
        if self._passed > self._num_samples + 4 * 16000:
            raise KeyboardInterrupt
        return frame


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "shown"), [("kiosk", ["(listening)", "(answered within "]), ("announcement", ["\n"])]
)
def test_an_example_talks(
    name: str, shown: list[str], bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        example(name).main(str(bundle_path), Visit(SPOKEN))
    out = capsys.readouterr().out
    assert all(piece in out for piece in shown)


def _run(name: str, *args: str | Path, ending: str = "") -> subprocess.CompletedProcess[str]:
    """An example as a program, in a Python that has no PyAudio."""
    program = "import runpy, sys; sys.modules['pyaudio'] = None; sys.argv = sys.argv[1:]\n"
    program += ending + "runpy.run_path(sys.argv[0], run_name='__main__')"
    path = ROOT / "examples" / f"{name}.py"
    command = [sys.executable, "-c", program, str(path), *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["kiosk", "announcement", "ask", "demo"])
def test_an_example_without_arguments_says_how_it_is_called(name: str) -> None:
    done = _run(name)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"usage: {name}.py" in done.stderr


@pytest.mark.parametrize("name", ["kiosk", "announcement"])
def test_an_example_without_pyaudio_is_one_line(name: str, bundle_path: Path) -> None:
    done = _run(name, bundle_path)
    assert done.returncode == 1
    assert done.stderr.startswith("deeptalk-edge: ")
    assert "pyaudio" in done.stderr.lower()
    assert done.stderr.count("\n") == 1


def test_an_example_ends_on_ctrl_c_without_a_message(bundle_path: Path, tmp_path: Path) -> None:
    ending = "import os, signal, threading\n"
    ending += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    ending += "from deeptalk_edge.runtime.conversation import Conversation\n"
    ending += "Conversation.ask = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
    with WavWriter(tmp_path / "question.wav", 16000) as writer:
        writer.write(read_wav(SPOKEN).pcm[:19200])  # the test bundle's window
    done = _run(
        "ask", bundle_path, tmp_path / "question.wav", tmp_path / "answer.wav", ending=ending
    )
    assert (done.returncode, done.stderr) == (130, "")
    assert [path.name for path in tmp_path.iterdir()] == ["question.wav"]


def test_an_example_does_not_answer_over_the_question(bundle_path: Path, tmp_path: Path) -> None:
    question = tmp_path / "question.wav"
    question.write_bytes(SPOKEN.read_bytes())
    calls: dict[str, list[str | Path]] = {
        "ask": [bundle_path, question, question],
        "demo": ["--bundle", bundle_path, "--out", tmp_path, "--wav", tmp_path / "answer.wav"],
    }
    for name, flags in calls.items():
        (tmp_path / "answer.wav").write_bytes(SPOKEN.read_bytes())
        done = _run(name, *flags)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "is the same file as" in done.stderr
        assert question.read_bytes() == SPOKEN.read_bytes()
        assert (tmp_path / "answer.wav").read_bytes() == SPOKEN.read_bytes()
