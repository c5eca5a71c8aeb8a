"""The hangover follows the cue; the cue follows the melody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from deeptalk_edge.errors import ArtifactError, SettingsError
from deeptalk_edge.runtime.audio.end_of_turn import (
    AdaptiveHangover,
    FixedHangover,
    HangoverSettings,
    MeaningHangover,
    open_end_of_turn,
)
from deeptalk_edge.runtime.audio.prosody import FinalLowering, final_pitch, pitch_hz
from deeptalk_edge.runtime.audio.smart_turn import SmartTurn
from deeptalk_edge.sound.wav import read_wav, resample
from tests.places import QUESTIONS_FOLDER
from tests.runtime.sounds import silence, voice

Array = NDArray[np.float32]


class Cue:
    """A cue with a constant probability."""

    def __init__(self, p: float) -> None:
        self._p = p

    def p_complete(self, utterance: Array) -> float:
        return self._p


def buzz(hz: NDArray[np.float64]) -> Array:
    """A voice whose pitch is given for every sample, and 100 ms of silence."""
    phase = 2 * np.pi * np.cumsum(hz) / 16000
    sound = sum(np.sin(k * phase) / k for k in range(1, 20))
    return np.concatenate([0.15 * np.asarray(sound, np.float32), silence(0.1)])


def said(start_hz: float, end_hz: float) -> Array:
    """1.2 s on one pitch, then 0.2 s on another."""
    return buzz(np.concatenate([np.full(19200, start_hz), np.full(3200, end_hz)]))


@pytest.mark.parametrize(
    ("p", "hangover_ms"), [(0.9, 200), (0.6, 200), (0.5, 500), (0.1, 500), (0.05, 1200)]
)
def test_a_more_certain_cue_shortens_the_wait(p: float, hangover_ms: int) -> None:
    assert AdaptiveHangover(Cue(p)).hangover_ms(voice(1)) == hangover_ms


@pytest.mark.parametrize(
    ("end_hz", "hangover_ms"),
    [(120 * 2 ** (-6 / 12), 200), (114, 500), (120 * 2 ** (5 / 12), 1200)],
)
def test_low_ends_are_answered_soon_and_high_ends_late(end_hz: float, hangover_ms: int) -> None:
    assert open_end_of_turn("adaptive").hangover_ms(said(120, end_hz)) == hangover_ms


@pytest.mark.parametrize("hz", [85, 140, 220, 330])
def test_the_pitch_of_a_buzz_is_found(hz: float) -> None:
    found = pitch_hz(buzz(np.full(16000, float(hz))))
    assert abs(np.nanmedian(found) / hz - 1) < 0.02
    assert np.isnan(found[-5:]).all()  # silence has no pitch


@pytest.mark.parametrize("pcm", [silence(0.001), silence(2), voice(0.1)], ids=["0", "2", "0.1"])
def test_too_little_voice_leaves_the_cue_unsure(pcm: Array) -> None:
    assert final_pitch(pcm) is None
    assert FinalLowering().p_complete(pcm) == 0.5


def test_finished_questions_are_more_certain_than_their_halves() -> None:
    cue = FinalLowering()
    whole, half = [], []
    for path in sorted(QUESTIONS_FOLDER.glob("*.wav")):
        pcm = resample(read_wav(path), 16000).pcm
        whole.append(cue.p_complete(pcm))
        half.append(cue.p_complete(pcm[: len(pcm) * 6 // 10]))
    assert np.mean(np.array(whole) >= 0.33) >= 0.4
    assert np.mean(np.array(half) >= 0.33) <= 0.2
    assert np.mean(np.array(half) >= HangoverSettings().complete_p) <= 0.05


def test_a_fixed_hangover_ignores_the_sound() -> None:
    fixed = open_end_of_turn("fixed", fixed_ms=320)
    assert fixed.hangover_ms(said(120, 80)) == 320
    assert fixed.enough_ms(0.0, True) is None


@pytest.mark.parametrize(
    ("text_log_p", "confident_log_p", "enough_ms"),
    [(-0.01, -0.01, 240), (0.0, -0.01, 240), (-0.02, -0.01, None), (0.0, None, None)],
)
def test_a_confident_answer_needs_no_more_silence_than_a_finished_sentence(
    text_log_p: float, confident_log_p: float | None, enough_ms: int | None
) -> None:
    settings = HangoverSettings(confident_log_p=confident_log_p, complete_ms=240)
    assert AdaptiveHangover(Cue(0.5), settings).enough_ms(text_log_p, None) == enough_ms


@pytest.mark.parametrize(("is_whole", "enough_ms"), [(True, 240), (False, None)])
def test_the_bundles_judgement_of_the_question_outweighs_the_answers_confidence(
    is_whole: bool, enough_ms: int | None
) -> None:
    settings = HangoverSettings(confident_log_p=-0.01, complete_ms=240)
    for text_log_p in (0.0, -5.0):
        judge = AdaptiveHangover(Cue(0.5), settings)
        assert judge.enough_ms(text_log_p, is_whole) == enough_ms


def test_by_meaning_only_a_whole_question_shortens_the_wait() -> None:
    judge = open_end_of_turn(knows_whole=True)
    settings = HangoverSettings()
    assert isinstance(judge, MeaningHangover)
    assert judge.hangover_ms(said(120, 80)) == settings.not_whole_ms
    assert judge.enough_ms(0.0, True) == settings.complete_ms
    assert judge.enough_ms(0.0, False) is None
    assert judge.enough_ms(0.0, None) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"complete_ms": 600},
        {"incomplete_ms": 100},
        {"complete_ms": 0},
        {"not_whole_ms": 100},
        {"complete_p": 1.1},
        {"confident_log_p": 0.1},
        {"confident_log_p": float("nan")},
    ],
)
def test_invalid_hangovers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        HangoverSettings(**wrong)
    with pytest.raises(SettingsError, match="a frame is 20 ms"):
        FixedHangover(10)


def write_model(path: Path, *, bias: float = 0.0, name: str = "input_features") -> Path:
    """A model of the format: the probability is the sigmoid of the mean of the last frames."""
    nodes = [
        helper.make_node("Slice", [name, "start", "end", "axis"], ["late"]),
        helper.make_node("ReduceMean", ["late"], ["mean"], keepdims=0),
        helper.make_node("Sigmoid", ["mean"], ["bounded"]),
        helper.make_node("Add", ["bounded", "bias"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "turn",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 80, 800])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [])],
        [
            helper.make_tensor("start", TensorProto.INT64, [1], [780]),
            helper.make_tensor("end", TensorProto.INT64, [1], [800]),
            helper.make_tensor("axis", TensorProto.INT64, [1], [2]),
            helper.make_tensor("bias", TensorProto.FLOAT, [], [bias]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


def test_a_smart_turn_file_hears_the_end_of_any_length(tmp_path: Path) -> None:
    turn = SmartTurn(write_model(tmp_path / "turn.onnx"))
    for seconds in (0.5, 8.0, 20.0):
        loud = turn.p_complete(np.concatenate([silence(0.1), voice(seconds)]))
        quiet = turn.p_complete(np.concatenate([voice(seconds), silence(0.3)]))
        assert 0 < quiet < loud < 1
    late = np.concatenate([voice(20), silence(0.3)])
    assert turn.p_complete(late) == turn.p_complete(late[-8 * 16000 :])
    assert turn.p_complete(late) != turn.p_complete(late[: 8 * 16000])
    judge = open_end_of_turn("adaptive", model=tmp_path / "turn.onnx")
    assert judge.hangover_ms(voice(1)) in (200, 500, 1200)


@pytest.mark.parametrize(
    ("bias", "name", "message"),
    [(2.0, "input_features", "gives a probability, found 2"), (0.0, "x", "expected a Smart Turn")],
)
def test_a_model_of_another_kind_is_refused(
    tmp_path: Path, bias: float, name: str, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        SmartTurn(write_model(tmp_path / "turn.onnx", bias=bias, name=name))


def test_an_absent_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"turn\.onnx: no such file"):
        open_end_of_turn("adaptive", model=tmp_path / "turn.onnx")
