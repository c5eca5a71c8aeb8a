"""A program ends with one line, the right exit code, and its files closed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deeptalk_edge import __version__
from deeptalk_edge.cli import as_program, main
from deeptalk_edge.errors import SettingsError
from tests.places import ROOT

# Unwritten output fails once more when the interpreter ends.
_BUFFERED = {**os.environ, "PYTHONUNBUFFERED": ""}

# It takes time to close its file, like a program with threads.
_PROGRAM = """
import sys, time
from deeptalk_edge import cli, program
program._PATIENCE_S = float(sys.argv[1])

def work():
    try:
        print("works", flush=True)
        while True:
            time.sleep(0.01)
    finally:
        print("closes", flush=True)
        sys.stdin.readline()
        print("closed", flush=True)

sys.exit(cli.as_program(work))
"""


def _heed_signals() -> None:
    """A shell may start its children with SIGINT ignored; `nohup make test` ignores SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextmanager
def _working(*before: str, patience_s: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """A child in the middle of its work; it closes when it gets a line."""
    with subprocess.Popen(
        [*before, sys.executable, "-c", _PROGRAM, str(patience_s)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_signals,
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "works\n"
            yield child
        finally:
            child.kill()


def _said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_closes_everything_and_names_itself(number: int, code: int) -> None:
    with _working() as child:
        child.send_signal(number)
        out, error = child.communicate("go\n", timeout=30)
        assert (out, error, child.returncode) == ("closes\nclosed\n", "", code)


def test_a_second_signal_at_once_does_not_disturb_closing() -> None:
    with _working() as child:
        child.send_signal(signal.SIGTERM)
        assert _said(child) == "closes"
        child.send_signal(signal.SIGHUP)  # systemd sends both, where it is told to
        child.send_signal(signal.SIGTERM)
        out, error = child.communicate("go\n", timeout=30)
        assert (out, error, child.returncode) == ("closed\n", "", 143)


def test_a_later_second_signal_ends_a_closing_that_hangs() -> None:
    with _working(patience_s=0.0) as child:
        child.send_signal(signal.SIGTERM)
        assert _said(child) == "closes"
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == -signal.SIGTERM


def test_nohup_still_protects_from_a_hangup() -> None:
    with _working("nohup") as child:
        child.send_signal(signal.SIGHUP)
        child.send_signal(signal.SIGTERM)
        child.communicate("go\n", timeout=30)
        assert child.returncode == 143


def test_a_program_leaves_the_signals_of_its_caller_as_they_were() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert as_program(lambda: 3) == 3
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_error_of_the_system_is_one_line_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        (tmp_path / "absent" / "file").read_bytes()

    assert as_program(work) == 1
    shown = capsys.readouterr().err
    assert shown == f"deeptalk-edge: {tmp_path}/absent/file: No such file or directory\n"


def test_an_error_for_the_user_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise SettingsError("wrong; do right")

    assert as_program(work) == 1
    assert capsys.readouterr().err == "deeptalk-edge: wrong; do right\n"


@pytest.mark.parametrize("error", [TypeError, ZeroDivisionError, AssertionError, RecursionError])
def test_a_bug_keeps_its_traceback(error: type[Exception]) -> None:
    def work() -> None:
        raise error

    with pytest.raises(error):
        as_program(work)


@pytest.mark.parametrize("argv", [["routes", "replay", "x", "--device", "list"], ["--help"]])
def test_stdout_on_a_full_disk_is_one_line(argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "deeptalk_edge.cli", *argv],
            cwd=ROOT,
            env=_BUFFERED,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.stderr == "deeptalk-edge: standard output: No space left on device\n"
    assert done.returncode == 1


def test_a_closed_pipe_ends_the_program_without_a_message() -> None:
    program = "from deeptalk_edge.cli import as_program; import sys\n"
    program += "sys.exit(as_program(lambda: print('x')))"
    end, start = os.pipe()
    os.close(end)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=_BUFFERED,
        stdout=start,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(start)
    assert (done.returncode, done.stderr) == (1, b"")


def test_a_closed_stdout_is_not_an_error() -> None:
    command = [sys.executable, "-m", "deeptalk_edge.cli", "routes", "replay", "x"]
    shell = f"{' '.join(command)} --device list >&-"
    done = subprocess.run(["sh", "-c", shell], cwd=ROOT, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_character_that_the_terminal_lacks_is_escaped() -> None:
    program = "from deeptalk_edge.cli import as_program; import sys\n"
    program += "sys.exit(as_program(lambda: print('\\u4f60 \\udcff')))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"\\u4f60 \\udcff\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["profile", "routes", "none.npz"], ["routes", "show", "none.npz"]),
        (["profile", "replay", "none.npz"], ["routes", "replay", "none.npz"]),
        (["profile", "run", "--bundle", "none"], ["profile", "--offline", "--bundle", "none"]),
        (["devices", "audio", "--meter", "-1"], ["sound", "--meter", "-1"]),
    ],
)
def test_an_old_spelling_works_and_warns_once(
    old: list[str], new: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(new)
    said = capsys.readouterr()
    assert main(old) == code
    notice = f"`{' '.join(old[:2])}` is `{' '.join(new[: len(new) - len(old) + 2])}` now\n"
    assert capsys.readouterr() == (said.out, notice + said.err)


def test_a_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"deeptalk-edge {__version__}\n"


@pytest.mark.parametrize(
    ("flags", "level"),
    [([], "WARNING"), (["-v"], "INFO"), (["-vv"], "DEBUG"), (["-vvv"], "DEBUG")],
)
def test_a_program_logs_more_only_with_v(
    flags: list[str], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[int] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **more: levels.append(more["level"]))
    assert main(["bundle", *flags, "inspect", "no bundle"]) != 0
    assert levels == [getattr(logging, level)]
