"""Scripted turns run through the real voice loop, with a report of each turn's cost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.cli import main
from deeptalk_edge.devices.probe import state
from deeptalk_edge.devices.report import read_report
from deeptalk_edge.devices.scripted_port import ScriptedPort
from deeptalk_edge.devices.session import Script, profile_bundle, state_of
from deeptalk_edge.errors import AudioError, SettingsError
from deeptalk_edge.runtime.audio.ports import FRAME_SAMPLES
from deeptalk_edge.runtime.backends.fake import NoExperts
from deeptalk_edge.runtime.settings import ConversationSettings
from deeptalk_edge.sound.sound_file import read_sound
from tests.devices.trees import ORIN_NANO, plant
from tests.places import ROOT
from tests.runtime.sounds import PCM, encode, silence, wav_bytes

pytestmark = pytest.mark.slow  # turns in real time


@pytest.fixture
def question(tmp_path: Path) -> Path:
    """A question shorter than the encoder's window."""
    path = tmp_path / "question.wav"
    recording = next((ROOT / "checkpoints/tiny/questions").glob("*-0.wav"))
    pcm = read_sound(recording).pcm[: int(1.2 * 16_000)]
    path.write_bytes(wav_bytes(encode(pcm, PCM, 16)))
    return path


def test_turns_are_asked_by_voice_and_every_figure_is_there(
    bundle_path: Path, question: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, samples = tmp_path / "report.json", tmp_path / "samples.jsonl"
    argv = ["profile", "--bundle", str(bundle_path), "--backend", "fake", "--wav", str(question)]
    argv += ["--turns", "1", "--warmup", "1", "--cut", "0.1"]
    assert main([*argv, "-o", str(report), "--samples", str(samples)]) == 0
    assert "voice to voice, ms" in capsys.readouterr().out
    found = read_report(report)
    assert found.metrics["v2v_ms"].n == 1
    assert found.metrics["v2v_ms"].p50 is not None
    assert found.metrics["eot_hangover_ms"].p50 is not None
    # The user waits at least until the end of the turn is detected.
    assert found.metrics["v2v_ms"].p50 >= found.metrics["eot_hangover_ms"].p50
    assert found.workload.questions == (f"{question.name} {_sha256(question)}",)
    assert found.bundle.backend == "fake"
    assert found.power.overhead_share is not None
    turns = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [turn["is_warmup"] for turn in turns] == [True, False]
    assert turns[1]["v2v_ms"] == found.metrics["v2v_ms"].max
    assert turns[1]["heard_s"] < 2  # the answer of the fake backend is longer than was heard


def test_turns_that_were_not_understood_are_counted(tmp_path: Path) -> None:
    assert main(["export", str(ROOT / "checkpoints/tiny"), "-o", str(tmp_path / "tiny")]) == 0
    backwards = tmp_path / "backwards.wav"
    pcm = read_sound(ROOT / "checkpoints/tiny/questions/both_new-0.wav").pcm[::-1]
    backwards.write_bytes(wav_bytes(encode(pcm, PCM, 16)))
    report = profile_bundle(
        tmp_path / "tiny", Script(questions=(backwards,), turns=1, warmup_turns=0)
    )
    assert any("1 of 1 turns were not understood" in warning for warning in report.warnings)


def test_what_experts_count_in_a_warmup_turn_is_not_reported(
    bundle_path: Path, question: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_done, nothing = [0], NoExperts().end_turn()
    monkeypatch.setattr(
        NoExperts,
        "end_turn",
        lambda self: nothing | {"hits": 1 if num_done[-1] else 1000, "slots": 8},
    )
    report = profile_bundle(
        bundle_path,
        Script(questions=(question,), turns=1, warmup_turns=1, cut_s=0.1),
        choose=lambda bundle: replace(ConversationSettings.of(bundle), backend="fake"),
        show=lambda done, total: num_done.append(done),
    )
    assert report.experts.hits is not None
    assert 1 <= report.experts.hits < 1000


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ([], "nothing to ask"),
        (["--wav", "q.wav", "--mic"], "--wav does not go with --mic"),
        (["--wav", "q.wav", "--input-device", "x"], "need --mic"),
        (["--text", "Why?"], "--text: the voice loop takes only sound"),
        (["--wav", "q.wav", "--cut", "0"], "--cut 0.0"),
        (["--wav", "q.wav", "--turns", "0"], "0 turns and 1 before"),
        (["--wav", "none.wav"], "none.wav"),
    ],
)
def test_what_cannot_be_profiled_is_refused_in_a_line(
    flags: list[str], complaint: str, bundle_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--bundle", str(bundle_path), *flags]) == 1
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_question_that_the_loop_does_not_hear_ends_the_session(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deeptalk_edge.devices.session._ANSWER_S", 0.3)
    path = tmp_path / "silence.wav"
    path.write_bytes(wav_bytes(encode(silence(0.2), PCM, 16)))
    with pytest.raises(AudioError, match="no answer within 0 s: the voice detector found no"):
        profile_bundle(bundle_path, Script(questions=(path,), turns=1))


def test_a_script_without_turns_is_refused(bundle_path: Path, question: Path) -> None:
    with pytest.raises(SettingsError, match="0 turns"):
        profile_bundle(bundle_path, Script(questions=(question,), turns=0))


def test_a_report_has_the_state_of_the_board(tmp_path: Path) -> None:
    found = state_of(state(plant(tmp_path, ORIN_NANO)))
    assert (found.power_mode, found.governor) == ("15W", "schedutil")
    assert (found.cpu_mhz, found.gpu_mhz, found.hottest_c) == (1510.4, 306, 47.5)
    assert found.missing["emc_mhz"]


def test_a_scripted_microphone_is_silent_until_it_is_told_to_ask() -> None:
    port = ScriptedPort()
    port.open()
    first = port.read(1.0)
    assert first is not None
    assert not first.pcm.any()
    port.ask(np.ones(FRAME_SAMPLES + 1, np.float32))
    loud = [frame.pcm.sum() for _ in range(3) if (frame := port.read(1.0))]
    assert loud == [FRAME_SAMPLES, 1, 0]
