"""A device measures its setup and costs; each figure has one meaning."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deeptalk_edge.bundle.manifest import MANIFEST
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.cli import main
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.runtime.conversation import Conversation, TurnDone
from deeptalk_edge.runtime.measure import FIGURES, measure
from tests.runtime.commands.test_run import question
from tests.runtime.sounds import voice
from tests.runtime.test_imports import TRAINING_STACK

__all__ = ["question"]


def shown(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(argv) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return content


def assert_says_what_ran(figures: dict[str, Any], bundle: Bundle) -> None:
    manifest = (bundle.path / MANIFEST).read_bytes()
    assert figures["bundle_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert (figures["backend"], figures["kernel_path"]) == ("ort", None)
    assert (figures["threads"], figures["mode"]) == (2, "single")
    assert figures["precision"] == bundle.manifest.precision
    assert figures["peak_resident_mb"] > 10


def test_a_turn_of_run_and_a_measurement_name_their_setup(
    bundle: Bundle, question: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--bundle", str(bundle.path), "--wav", str(question), "--threads", "2"]
    flags += ["--mode", "single", "--json"]
    turn = shown(["run", *flags], capsys)
    report = shown(["profile", "--offline", *flags, "--repeat", "2"], capsys)
    for figures in (turn, report):
        assert_says_what_ran(figures, bundle)
    assert (report["num_questions"], report["num_answers"]) == (1, 2)
    assert report["load_ms"] > 0
    assert turn["real_time_factor"] == turn["compute_s"] / turn["audio_s"]
    for name in FIGURES:
        assert report[f"{name}_p95"] >= report[name] > 0
    assert report["audio_s"] == turn["audio_s"]


def test_the_page_omits_absent_figures(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "profile",
        "--offline",
        "--bundle",
        str(bundle.path),
        "--text",
        "Why?",
        "--mode",
        "text",
    ]
    assert main([*argv, "--repeat", "1"]) == 0
    page = capsys.readouterr().out
    assert f"SHA-256 {bundle.sha256[:12]}" in page
    assert "ONNX Runtime, 1 thread(s), text" in page
    lines = {line[:38].strip(): line[38:].split() for line in page.splitlines()}
    assert lines["encoder, ms"] == lines["compute per second of sound"] == ["-", "-"]
    assert all(float(value) > 0 for value in lines["step, ms"])


@pytest.mark.parametrize(("questions", "repeat"), [([], 5), (["Why?"], 0)])
def test_a_measurement_without_questions_is_refused(
    bundle: Bundle, questions: list[Any], repeat: int
) -> None:
    with pytest.raises(SettingsError, match="expected 1 or more of both"):
        measure(bundle.path, questions, repeat=repeat)


def test_each_question_is_measured_in_a_new_conversation(bundle: Bundle) -> None:
    report = measure(bundle.path, [voice(0.6)], repeat=3)
    with Conversation(bundle) as talk:
        talk.idle()
        *_, done = talk.ask(voice(0.6))
        assert isinstance(done, TurnDone)
    assert report["num_prompt_rows"] == report["num_prompt_rows_p95"]
    assert report["num_prompt_rows"] == done.metrics.num_prompt_rows


def test_a_measurement_loads_no_training_stack(bundle: Bundle) -> None:
    code = "import sys; from deeptalk_edge.cli import main; code = main(sys.argv[1:])\n"
    code += "print(*sys.modules); sys.exit(code)"
    argv = ["profile", "--offline", "--bundle", str(bundle.path), "--text", "Why?", "--repeat", "1"]
    command = [sys.executable, "-c", code, *argv]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not set(finished.stdout.split()) & TRAINING_STACK
