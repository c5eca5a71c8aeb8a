"""The command line from outside, as a person and a script use it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.cli import main
from deeptalk_edge.devices.replay.study import open_routes
from deeptalk_edge.runtime.experts.policy import Phase
from deeptalk_edge.sound.wav import Sound, WavWriter, read_wav, resample
from tests.disks import device_node, small_disk
from tests.manifests import edit_manifest
from tests.places import ROOT
from tests.runtime.sounds import silence

SPOKEN = sorted((ROOT / "checkpoints" / "tiny" / "questions").glob("*.wav"))[0]


@pytest.fixture
def question(tmp_path: Path) -> Path:
    """A spoken question at 48 kHz, with silence around it."""
    path = tmp_path / "question.wav"
    with WavWriter(path, 48000) as writer:
        writer.write(asked(1))
    return path


def asked(times: int) -> NDArray[np.float32]:
    """The beginning of a spoken question at 48 kHz, repeated, with silence around it."""
    spoken = resample(Sound(read_wav(SPOKEN).pcm[:19200], 16000), 48000).pcm
    return np.concatenate([silence(0.6, 48000), *[spoken, silence(1.4, 48000)] * times])


def test_a_spoken_question_gets_a_spoken_answer(
    bundle_path: Path, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answer.wav"
    assert (
        main(["run", "--bundle", str(bundle_path), "--wav", str(question), "--out", str(out)]) == 0
    )
    shown = capsys.readouterr().out
    assert shown.startswith("you: question.wav (1.")
    assert "deeptalk: " in shown
    assert "end of speech to first sample" in shown
    answer = read_wav(out)
    assert answer.rate_hz == 24000
    assert len(answer.pcm) == (24 - 7) * 2048


def test_json_is_one_object_a_turn(
    bundle_path: Path, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "--bundle", str(bundle_path), "--wav", str(question), str(question)]
    argv += ["--text", "And then?", "--out", str(tmp_path / "answer.wav"), "--json"]
    assert main([*argv, "--mode", "single"]) == 0
    turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [turn["turn"] for turn in turns] == [1, 2, 3]
    assert turns[2]["question"] == "And then?"
    assert turns[2]["encoder_ms"] is None
    assert turns[0]["stopped"] == "max_rows"
    assert turns[0]["first_sample_ms"] >= turns[0]["first_frame_ms"] > 0
    for turn in turns:
        assert turn["out"] == str(tmp_path / f"answer-{turn['turn']}.wav")
        assert read_wav(turn["out"]).seconds == pytest.approx(turn["audio_s"])


def test_each_utterance_in_a_file_is_a_turn_with_its_own_answer(
    bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with WavWriter(tmp_path / "three.wav", 48000) as writer:
        writer.write(asked(3))
    argv = ["run", "--bundle", str(bundle_path), "--wav", str(tmp_path / "three.wav")]
    assert main([*argv, "--out", str(tmp_path / "answer.wav"), "--json"]) == 0
    turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [turn["utterance"] for turn in turns] == [1, 2, 3]
    assert {turn["question"] for turn in turns} == {str(tmp_path / "three.wav")}
    assert [Path(turn["out"]).name for turn in turns] == [f"answer-{n}.wav" for n in (1, 2, 3)]
    assert not (tmp_path / "answer.wav").exists()
    assert main([*argv, "--mode", "text"]) == 0
    assert "you: three.wav, 2 of 3 (1." in capsys.readouterr().out
    assert main([*argv, "--out", "-"]) == 1
    assert "one WAV on stdout" in capsys.readouterr().err
    (tmp_path / "answer-2.wav").unlink()
    (tmp_path / "answer-2.wav").symlink_to(tmp_path / "three.wav")
    assert main([*argv, "--out", str(tmp_path / "answer.wav")]) == 1
    assert "is the same file as" in capsys.readouterr().err


def test_speech_longer_than_the_window_is_cut_into_questions_with_a_warning(
    bundle_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoken = np.concatenate([read_wav(SPOKEN).pcm[:19200]] * 3)
    with WavWriter(tmp_path / "long.wav", 16000) as writer:
        writer.write(spoken)
    argv = ["run", "--bundle", str(bundle_path), "--wav", str(tmp_path / "long.wav"), "--json"]
    assert main([*argv, "--mode", "text"]) == 0
    turns = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(turns) == 3
    assert max(turn["speech_s"] for turn in turns) < 2  # the encoder's window
    assert sum(turn["speech_s"] for turn in turns) == pytest.approx(3.6, abs=0.5)
    assert caplog.text.count("speech without a pause for 1.6 s, the longest question") == 2


@pytest.mark.parametrize(("flags", "same"), [(["--forget"], True), ([], False)])
def test_only_with_forget_each_question_begins_a_new_conversation(
    flags: list[str], same: bool, bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "--bundle", str(bundle_path), "--text", "Why?", "--text", "Why?", "--json"]
    assert main([*argv, *flags]) == 0
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert (first["num_prompt_rows"] == second["num_prompt_rows"]) is same


def test_the_model_sees_as_many_turns_as_the_bundle_or_the_user_says(
    own_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(own_copy, lambda m: m["generation"].update(max_turns=2))
    argv = ["run", "--bundle", str(own_copy), *["--text", "Why?"] * 4, "--json"]
    seen = {}
    for flags in ([], ["--max-turns", "1"], ["--max-turns", "all"]):
        assert main([*argv, *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        seen[" ".join(flags)] = [json.loads(line)["num_prompt_rows"] for line in lines]
    first = seen[""][0]
    assert seen["--max-turns 1"] == [first] * 4  # each one without history
    assert seen[""][2] == seen[""][3] < seen["--max-turns all"][1] < first


def test_another_system_prompt_changes_the_prompt_rows(
    bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "--bundle", str(bundle_path), "--text", "Why?", "--json"]
    assert main(argv) == 0
    assert main([*argv, "--system", "Be brief and polite."]) == 0
    own, given = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    # The bundle's is "Be brief."; an id is a byte.
    assert given["num_prompt_rows"] == own["num_prompt_rows"] + len(" and polite")


def test_recorded_routes_can_be_read_by_profile(
    bundle_path: Path, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    routes = tmp_path / "routes.npz"
    argv = ["run", "--bundle", str(bundle_path), "--wav", str(question), str(question)]
    assert main([*argv, "--record-routes", str(routes)]) == 0
    recorded = open_routes(str(routes))
    phases = [each.phase for each in recorded.passes]
    assert phases.count(Phase.LISTENING) == 2
    assert phases.count(Phase.SPEAKING) > 2 * 20
    assert {call.layer for each in recorded.passes for call in each.calls} == set(recorded.layers)
    capsys.readouterr()
    assert main(["routes", "replay", str(routes), "--pool", "50%", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_text_answer_writes_no_sound(
    bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answer.wav"
    argv = ["run", "--bundle", str(bundle_path), "--text", "Why?", "--mode", "text", "--json"]
    assert main([*argv, "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["out"] is None
    assert not out.exists()


def test_the_same_seed_writes_the_same_file(bundle_path: Path, tmp_path: Path) -> None:
    for name in ("one.wav", "two.wav"):
        argv = ["run", "--bundle", str(bundle_path), "--text", "Why?", "--seed", "3"]
        assert main([*argv, "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "one.wav").read_bytes() == (tmp_path / "two.wav").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--wav", "absent.wav"], "absent.wav"),
        (["--wav", "{tmp}/silent.wav"], "no speech heard in 1.0 s"),
        ([], "nothing to ask"),
        (["--text", "x", "--seed", "-1"], "seed = -1"),
        (["--text", "x", "--seed", str(2**64)], "expected 0 to 18446744073709551615"),
        (["--text", "x", "--threads", "0"], "threads = 0"),
        (["--text", "x", "--max-turns", "0"], "max_turns = 0"),
        (["--text", "x", "--max-turns", "x"], "--max-turns x: expected a number, or all"),
        (["--text", ""], "the question is empty"),
        (["--text", "x", "--threads", "1025"], "threads = 1025: expected 1 to 1024"),
        (["--text", "x", "--speaker", "M29"], "this checkpoint has"),
        (["--text", "x", "--out", "{tmp}/absent/a.wav"], "cannot be written"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(
    bundle_path: Path,
    tmp_path: Path,
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with WavWriter(tmp_path / "silent.wav", 16000) as writer:
        writer.write(silence(1))
    named = [flag.format(tmp=tmp_path) for flag in flags]
    assert main(["run", "--bundle", str(bundle_path), *named]) == 1
    error = capsys.readouterr().err
    assert error.startswith("deeptalk-edge: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--wav", "{q}", "--out", "{q}"], "{q}"),
        (["--wav", "{q}", "--out", "{tmp}/link.wav"], "link.wav"),
        (["--wav", "{tmp}/a-1.wav", "{q}", "--out", "{tmp}/a.wav"], "a-1.wav"),
        (["--wav", "{q}", "--record-routes", "{q}"], "{q}"),
        (["--wav", "{q}", "--out", "{tmp}/x", "--record-routes", "{tmp}/x"], "x"),
        (["--text", "x", "--not-understood", "{q}", "--out", "{q}"], "{q}"),
        (["--text", "x", "--out", "{bundle}/experts.bin"], "experts.bin"),
        (["--mic", "--input-device", "{q}", "--output-device", "{q}"], "{q}"),
        (["--mic", "--input-device", "{q}", "--output-device", "{tmp}/link.wav"], "link.wav"),
        (["--mic", "--input-device", "{q}", "--trace", "{q}"], "{q}"),
        (["--mic", "--turn-model", "{q}", "--trace", "{q}"], "{q}"),
    ],
)
def test_files_of_the_user_are_never_overwritten(
    flags: list[str],
    named: str,
    bundle_path: Path,
    question: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "link.wav").symlink_to(question)
    (tmp_path / "a-1.wav").write_bytes(question.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    places = {"q": question, "tmp": tmp_path, "bundle": bundle_path}
    argv = ["run", "--bundle", str(bundle_path), *(flag.format(**places) for flag in flags)]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert f"{named.format(**places)}: is the same file as" in error
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["loudspeaker.wav", "microphone-2.wav"])
def test_no_output_replaces_a_recording(
    name: str, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "--bundle", str(tmp_path), "--mic", "--input-device", str(question)]
    argv += ["--record", str(tmp_path / "rec"), "--trace", str(tmp_path / "rec" / "trace.json")]
    (tmp_path / "rec").mkdir()
    assert main([*argv, "--output-device", str(tmp_path / "rec" / name)]) == 1
    assert "--record writes there" in capsys.readouterr().err
    assert main([*argv, "--output-device", str(tmp_path / "rec" / "answer.wav")]) == 1
    assert "not a bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--text", "x", "--out", "{tmp}/absent/a.wav"],
        ["--text", "x", "--out", "{tmp}"],
        ["--text", "x", "--record-routes", "{tmp}/absent/r.npz"],
        ["--mic", "--trace", "{tmp}/absent/t.json"],
        ["--mic", "--record", "{tmp}/file/rec"],
    ],
)
def test_a_place_that_cannot_be_written_is_found_before_the_bundle_is_opened(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    argv = ["run", "--bundle", str(tmp_path / "no_bundle")]
    assert main([*argv, *(flag.format(tmp=tmp_path) for flag in flags)]) == 1
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert "free room" not in error
    assert error.count("\n") == 1


def test_a_full_disk_ends_an_answer_with_an_error_and_keeps_what_was_written(
    bundle_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "32k") as disk:
        out = disk / "answer.wav"
        argv = ["run", "--bundle", str(bundle_path), "--text", "Why?", "--out", str(out)]
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert f"{out}: kept the 0." in error
        assert f"{out}: cannot be written (No space left on device); free room" in error
        assert read_wav(out).seconds > 0.1
        assert [path.name for path in disk.iterdir()] == ["answer.wav"]


def test_routes_on_a_full_disk_are_a_warning(
    bundle_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", "4k") as disk:
        (disk / "ballast").write_bytes(bytes(4096))
        argv = ["run", "--bundle", str(bundle_path), "--text", "Why?", "--mode", "text"]
        assert main([*argv, "--record-routes", str(disk / "routes.npz")]) == 0
        assert "routes.npz: cannot be written (No space left" in caplog.text
        assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_an_answer_can_go_to_a_device_and_to_stdout(
    bundle_path: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    argv = ["run", "--bundle", str(bundle_path), "--text", "Why?", "--out"]
    null = device_node(tmp_path / "null", 3)
    assert main([*argv, str(null)]) == 0
    assert null.is_char_device()
    capfdbinary.readouterr()
    assert main([*argv, str(tmp_path / "answer.wav")]) == 0
    capfdbinary.readouterr()
    assert main([*argv, "-"]) == 0
    sound, text = capfdbinary.readouterr()
    assert b"you: Why?" in text
    (tmp_path / "piped.wav").write_bytes(sound)
    np.testing.assert_array_equal(
        read_wav(tmp_path / "piped.wav").pcm, read_wav(tmp_path / "answer.wav").pcm
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--text", "x", "--text", "y", "--out", "-"],
        ["--text", "x", "--out", "-", "--json"],
        ["--text", "x", "--record-routes", "-"],
        ["--mic", "--trace", "-"],
    ],
)
def test_stdout_takes_only_one_output(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--bundle", str(tmp_path), *flags]) == 1
    assert capsys.readouterr().err.startswith("deeptalk-edge: --")


def test_a_place_without_a_bundle_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bundle", "verify", str(tmp_path)]) == 1
    assert "not a bundle" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [[], ["sing"], ["run"], ["run", "--bundle"], ["bundle", "burn", "x"], ["run", "--x"]]
)
def test_a_wrong_flag_is_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert "usage: deeptalk-edge" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["run", "-h"], ["bundle", "-h"]])
def test_help_is_exit_code_0(argv: list[str]) -> None:
    assert main(argv) == 0


def test_a_bundle_is_shown_and_verified(
    bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bundle", "inspect", str(bundle_path)]) == 0
    assert "5 experts" in capsys.readouterr().out
    assert main(["bundle", "inspect", str(bundle_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == 1
    assert main(["bundle", "verify", str(bundle_path)]) == 0
    assert "whole" in capsys.readouterr().out
    assert main(["bundle", "verify", str(bundle_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["expert_records"] == 10


def test_ctrl_c_keeps_what_was_said_and_is_exit_code_130(own_copy: Path, tmp_path: Path) -> None:
    # 25 s of sound at the pace of a loudspeaker.
    edit_manifest(own_copy, lambda m: m["generation"].update(max_rows=300))
    out = tmp_path / "answer.wav"
    argv = ["run", "-v", "--realtime", "--bundle", str(own_copy), "--text", "Why?"]
    # A shell may start its children with SIGINT ignored.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from deeptalk_edge.cli import main; sys.exit(main(sys.argv[1:]))"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *argv, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stderr is not None
        for line in child.stderr:
            if "first sound" in line:
                break
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
    assert child.returncode == 130
    assert f"{out}: kept the" in rest
    assert "Traceback" not in rest
    assert 0 < read_wav(out).seconds < 20
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_that_stdout_cannot_encode_loses_no_turn(encoding: str, bundle_path: Path) -> None:
    asked = ["--mode", "text", "--text", "Gr\u00fc\u00dfe \u4f60\u597d", "--text", "And then?"]
    done = subprocess.run(
        [sys.executable, "-m", "deeptalk_edge.cli", "run", "--bundle", str(bundle_path), *asked],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u4f60\\u597d" in done.stdout
    assert done.stdout.count(b"you: ") == 2
