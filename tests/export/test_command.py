"""`deeptalk-edge export`, as a user calls it."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from deeptalk_edge.bundle.reader import Bundle
from tests.export.checkpoints import write_checkpoint
from tests.places import ROOT


def _run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deeptalk_edge.cli", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_export_writes_a_bundle_and_lists_its_files(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint").place
    finished = _run("export", checkpoint, "-o", tmp_path / "bundle")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""  # no progress bar without a terminal
    files = Bundle.open(tmp_path / "bundle").manifest.files
    lines = finished.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(files)
    assert lines[-1].startswith(f"{len(files)} files")


def test_an_error_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    finished = _run("export", tmp_path / "nothing", "-o", tmp_path / "bundle")
    assert finished.returncode == 1
    assert "config.json" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "bundle").exists()


def test_an_export_that_gets_sigterm_keeps_what_is_done_and_is_exit_code_143(
    tmp_path: Path,
) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint").place
    program = (
        "import os, signal, sys\n"
        "from deeptalk_edge.cli import main\n"
        "from deeptalk_edge.export import bundle\n"
        "begin = bundle._Steps.begin\n"
        "def end(steps, name):\n"
        "    if name == 'golden':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    begin(steps, name)\n"
        "bundle._Steps.begin = end\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    place = tmp_path / "out" / "bundle"
    command = [sys.executable, "-c", program, "export", str(checkpoint), "-o", str(place)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 143
    assert "Traceback" not in finished.stderr
    (left,) = place.parent.iterdir()
    assert (left / "journal.json").is_file()
    assert (left / "experts.bin").is_file()


@pytest.mark.parametrize("module", ["torch", "transformers", "onnx", "onnxruntime", "numpy"])
def test_help_loads_nothing_heavy(module: str) -> None:
    program = (
        "import argparse, sys\n"
        "from deeptalk_edge.export.command import add_arguments\n"
        "add_arguments(argparse.ArgumentParser())\n"
        f"sys.exit({module!r} in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def test_export_needs_no_torch(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint").place
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from pathlib import Path\n"
        "from deeptalk_edge.export.bundle import ExportSettings, export_bundle\n"
        "export_bundle(Path(sys.argv[1]), Path(sys.argv[2]), ExportSettings())\n"
    )
    command = [sys.executable, "-c", program, str(checkpoint), str(tmp_path / "bundle")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_progress_is_shown_on_a_terminal(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint").place
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "deeptalk_edge.cli", "export", str(checkpoint)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "bundle")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        check=False,
    )
    os.set_blocking(ours, False)
    shown = os.read(ours, 1 << 16)
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0, shown
    assert b"encoder" in shown
