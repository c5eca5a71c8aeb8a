"""Every command of README and docs runs as printed, or has a reason here why it is not run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deeptalk_edge.cli import main
from tests.places import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "checkpoints").glob("*/README.md")),
    *sorted((ROOT / "native").glob("*/README.md")),
]

MICROPHONE = (
    "needs a microphone; tests/runtime/loop runs `run --mic` on WAV files, "
    "tests/runtime/sound_card on a card"
)
JETSON = "needs a Jetson"
LONG = "takes minutes to hours, or downloads; the target is checked to exist"
KIOSK = (
    "takes minutes and speech synthesisers; tests/training runs every action on a toy checkpoint"
)
SUITE = "is the suite itself, or its checks"

CALIBRATED = "runs with the `calibrate` of docs/calibration.md"

NOT_RUN = {
    **dict.fromkeys(
        (
            "deeptalk-edge export CHECKPOINT --device cpu-int8 --table TABLE -o calibrated.bundle",
            "deeptalk-edge bundle inspect calibrated.bundle",
            "deeptalk-edge calibrate CHECKPOINT -o TABLE",
        ),
        CALIBRATED,
    ),
    "deeptalk-edge run --bundle BUNDLE --mic": MICROPHONE,
    "deeptalk-edge run --bundle cpu.bundle --mic": MICROPHONE,
    "deeptalk-edge run --bundle B --mic": MICROPHONE,
    "deeptalk-edge sound": MICROPHONE,
    "deeptalk-edge sound --meter 5": MICROPHONE,
    **dict.fromkeys(
        (
            "deeptalk-edge train speak examples/kiosk_answers/answers.csv --takes 60 "
            "--checkpoint checkpoints/tiny -o kiosk/new",
            "deeptalk-edge train speak examples/kiosk_answers/rehearse.csv --takes 3 --held-out 1 "
            "--checkpoint checkpoints/tiny -o kiosk/old",
            "deeptalk-edge train speak examples/kiosk_answers/not_rehearsed.csv --takes 0 "
            "--held-out 1 --checkpoint checkpoints/tiny -o kiosk/kept",
            "deeptalk-edge train check AQACONVA=kiosk/new/train.jsonl --checkpoint "
            "checkpoints/tiny",
            "deeptalk-edge train examples/kiosk_answers/kiosk.toml",
            "deeptalk-edge train eval kiosk/run/final AQACONVA=kiosk/new/held_out.jsonl",
            "deeptalk-edge train eval kiosk/run/final AQACONVA=kiosk/old/held_out.jsonl "
            "--base checkpoints/tiny",
            "deeptalk-edge train eval kiosk/run/final AQACONVA=kiosk/kept/held_out.jsonl "
            "--max-samples 250",
            "deeptalk-edge export kiosk/run/final -o kiosk/bundle",
            'deeptalk-edge run --bundle kiosk/bundle --text "where can i rent a bike"',
        ),
        KIOSK,
    ),
    **dict.fromkeys(("make test", "make test-slow", "make check"), SUITE),
    **dict.fromkeys(
        (
            *("make gpu-check", "make native", "make plugin", "make routes", "make sanitize"),
            *("make tiny", "make wheels"),
        ),
        LONG,
    ),
}

OFFLINE = "deeptalk-edge profile --bundle BUNDLE --wav q.wav --offline --repeat 1"

# A printed command that is a template for others, or names the reader's files.
STANDS_FOR = {
    "deeptalk-edge calibrate CHECKPOINT --utterances checkpoints/tiny/questions "
    "--precision experts=int4:32 -o TABLE": [
        "deeptalk-edge calibrate CHECKPOINT --utterances "
        "checkpoints/tiny/questions/new_voice-0.wav "
        "checkpoints/tiny/questions/new_voice-1.wav --precision experts=int4:32 --method mse "
        "--floor 0 --bundle BUNDLE -o TABLE",
        "deeptalk-edge export CHECKPOINT --device cpu-int8 --table TABLE -o calibrated.bundle",
        "deeptalk-edge bundle inspect calibrated.bundle",
    ],
    "deeptalk-edge --help, ms": ["deeptalk-edge --help"],
    "deeptalk-edge bundle inspect|verify|sign|keygen": [
        "deeptalk-edge bundle inspect BUNDLE",
        "deeptalk-edge bundle verify BUNDLE",
        "deeptalk-edge bundle keygen me",
        "deeptalk-edge bundle sign BUNDLE --key me.key",
    ],
    "deeptalk-edge profile --offline": [OFFLINE],
    "deeptalk-edge profile --bundle B --wav q.wav --offline": [OFFLINE],
    "deeptalk-edge profile --bundle BUNDLE --wav q.wav --offline": [OFFLINE],
    "deeptalk-edge profile --bundle B --wav q.wav": [  # 20 turns in real time take two minutes
        "deeptalk-edge profile --bundle BUNDLE --wav q.wav --turns 1 --warmup 0 --cut 0.1"
    ],
    "deeptalk-edge profile --bundle BUNDLE --wav q.wav --turns 3 --cut 1 -o report.json "
    "--samples turns.jsonl": [
        "deeptalk-edge profile --bundle BUNDLE --wav q.wav --turns 1 --warmup 0 --cut 0.1 "
        "-o report.json --samples turns.jsonl"
    ],
}
# Commands whose exit code depends on the machine.
MAY_FAIL = ("deeptalk-edge doctor", "deeptalk-edge doctor --json")
DEMOS = ("make demo", "make demo WAV=my.wav")
SLOW = (
    "deeptalk-edge routes replay synthetic:mid --device all",
    "deeptalk-edge routes replay synthetic:mid --device orin-nano-8gb",
    "deeptalk-edge calibrate CHECKPOINT --utterances checkpoints/tiny/questions "
    "--precision experts=int4:32 -o TABLE",
    "deeptalk-edge profile --bundle B --wav q.wav",
)


def commands_of(page: Path) -> Iterator[str]:
    """The commands: lines of code blocks up to a comment, and text between backticks."""
    text = page.read_text(encoding="utf-8")
    blocks = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
    for block in blocks.findall(text):
        for line in block.splitlines():
            if re.match(r"(deeptalk-edge|make) ", line.strip()):
                yield re.split(r"\s{2,}|\s+#", line.strip())[0]
    for code in re.findall(r"`((?:deeptalk-edge|make) [^`]+)`", blocks.sub("", text)):
        yield re.sub(r"\s+", " ", code)


COMMANDS = sorted({command for page in PAGES for command in commands_of(page)})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the docs name."""
    place = tmp_path_factory.mktemp("docs")
    (place / "checkpoints").symlink_to(ROOT / "checkpoints")
    (place / "tests").symlink_to(ROOT / "tests")
    question = next((ROOT / "checkpoints/tiny/questions").glob("*.wav"))
    shutil.copy(question, place / "q.wav")
    assert main(["export", str(ROOT / "checkpoints/tiny"), "-o", str(place / "bundle")]) == 0
    return place


def argv_of(command: str) -> list[str]:
    names = {
        "CHECKPOINT": "checkpoints/tiny",
        "C": "checkpoints/official-size",
        "BUNDLE": "bundle",
        "B": "bundle",
        "ROUTES": "tests/runtime/experts/tiny_routes.npz",
    }
    return [names.get(word, word) for word in shlex.split(command)[1:]]


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] if command in SLOW else [])
        for command in COMMANDS
        if command.startswith("deeptalk-edge")
    ],
)
def test_a_printed_command_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if command in NOT_RUN:
        pytest.skip(NOT_RUN[command])
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "config"))  # `probe` writes there
    for each in STANDS_FOR.get(command, [command]):
        argv = argv_of(each)
        if each == "deeptalk-edge export CHECKPOINT -o BUNDLE":
            argv[-1] = "another"  # the other commands use the first one
        if "-o" in argv:  # the reader's place, which two pages may name
            shutil.rmtree(argv[argv.index("-o") + 1], ignore_errors=True)
        assert main(argv) in (0, int(command in MAY_FAIL)), each


@pytest.mark.parametrize("command", [c for c, why in NOT_RUN.items() if why in (KIOSK, CALIBRATED)])
def test_a_printed_command_that_is_not_run_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv_of(command)) == 1, "its files are missing here; 2 says that a flag is wrong"


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_a_printed_target_exists(command: str) -> None:
    argv = shlex.split(command)
    done = subprocess.run(
        [*argv, "-n"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", DEMOS)
def test_the_demo_runs(command: str, place: Path) -> None:
    argv = shlex.split(command.replace("my.wav", str(place / "q.wav")))
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "deeptalk:" in done.stdout


def test_every_printed_command_is_run_or_has_a_reason() -> None:
    run = {command for command in COMMANDS if command.startswith("deeptalk-edge")} - NOT_RUN.keys()
    run |= {*DEMOS, "make help"}
    run |= {command for command in COMMANDS if command.startswith("make bench")}  # LONG
    assert not set(COMMANDS) - run - NOT_RUN.keys()
    assert not NOT_RUN.keys() - set(COMMANDS), "a reason for what no page prints"
    assert not STANDS_FOR.keys() - set(COMMANDS)
