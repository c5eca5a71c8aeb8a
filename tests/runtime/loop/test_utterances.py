"""A recording is cut where the live loop cuts it; the tests compare with the loop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deeptalk_edge.errors import AudioError
from deeptalk_edge.runtime.audio.detectors import open_detector
from deeptalk_edge.runtime.audio.end_of_turn import EndOfTurn, FixedHangover, open_end_of_turn
from deeptalk_edge.runtime.audio.vad import VoiceDetector
from deeptalk_edge.runtime.audio.virtual_port import VirtualPort, recording
from deeptalk_edge.runtime.loop.fake_talker import FakeAnswer, FakeTalker
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.runtime.loop.signals import Command
from deeptalk_edge.runtime.loop.simulation import Simulation
from deeptalk_edge.runtime.loop.utterances import UtteranceCutter, read_utterances
from deeptalk_edge.sound.wav import WavWriter, read_wav
from tests.places import QUESTIONS_FOLDER
from tests.runtime.loop.scenes import LoudnessDetector, Stage

Array = NDArray[np.float32]

QUESTIONS = sorted((QUESTIONS_FOLDER).glob("*.wav"))
WINDOW = 10 * 16000 - 1


def speech(*spans_s: tuple[float, float], length_s: float) -> Array:
    """Loud in the spans, quiet elsewhere."""
    pcm = np.full(int(length_s * 16000), 0.001, np.float32)
    for first_s, last_s in spans_s:
        pcm[round(first_s * 16000) : round(last_s * 16000)] = 0.1
    return pcm


def cut(pcm: Array, hangover_ms: int = 500) -> list[tuple[int, int]]:
    settings, hangover = LoopSettings().within(WINDOW), FixedHangover(hangover_ms)
    cutter = UtteranceCutter(settings, LoudnessDetector(), hangover)
    return list(cutter.cut(pcm))


class Listener(FakeTalker):
    """Records its questions; answers at once and briefly."""

    def __init__(self) -> None:
        super().__init__(lambda turn: 1)
        self.max_question_samples = WINDOW
        self.asked: list[Array] = []

    def begin(self, question: Array | str) -> FakeAnswer:
        assert not isinstance(question, str)
        self.asked.append(question)
        return super().begin(question)


def asked_live(
    pcm: Array, detector: VoiceDetector | None = None, end_of_turn: EndOfTurn | None = None
) -> list[Array]:
    """The live loop's questions for the recording and two seconds of silence."""
    talker = Listener()
    simulation = Simulation(
        talker,
        VirtualPort(recording(pcm)),
        detector=detector or LoudnessDetector(),
        settings=LoopSettings(is_speculating=False),
        end_of_turn=end_of_turn,
        step_ms=lambda: 0.0,
        emit=lambda event: None,
    )
    simulation.run(len(pcm) / 16000 + 2)
    return talker.asked


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.integers(10, 150), st.integers(55, 100)), min_size=1, max_size=4),
    st.integers(0, 50),
)
def test_a_recording_is_cut_where_the_live_loop_cuts(
    spoken: list[tuple[int, int]], before: int
) -> None:
    """Frames of speech and of the pause after it: longer than an answer takes, and the pre-roll."""
    pieces = [speech(length_s=before / 50)]
    for voice, pause in spoken:
        pieces += [speech((0, voice / 50), length_s=(voice + pause) / 50)]
    pcm = np.concatenate(pieces)
    spans = cut(pcm)
    live = asked_live(pcm)
    assert len(spans) == len(live) == len(spoken)
    for (start, end), heard in zip(spans, live, strict=True):
        np.testing.assert_array_equal(pcm[start:end], heard)


def test_real_speech_is_cut_where_the_live_loop_cuts() -> None:
    pause = np.zeros(int(1.3 * 16000), np.float32)
    questions = [read_wav(path).pcm for path in QUESTIONS[:4]]
    pcm = np.concatenate([piece for question in questions for piece in (pause, question)])
    live = asked_live(pcm, open_detector(), open_end_of_turn())
    cutter = UtteranceCutter(LoopSettings().within(WINDOW), open_detector(), open_end_of_turn())
    spans = list(cutter.cut(pcm))
    assert len(spans) == len(live) == 4
    for (start, end), heard in zip(spans, live, strict=True):
        np.testing.assert_array_equal(pcm[start:end], heard[: end - start])
        assert not heard[end - start :].any()  # beyond the recording


@pytest.mark.parametrize("hangover_ms", [200, 500, 1200])
def test_a_pause_shorter_than_the_hangover_cuts_nothing(hangover_ms: int) -> None:
    for longer_ms, num_utterances in ((-60, 1), (20, 2)):
        next_s = 2 + (hangover_ms + longer_ms) / 1000
        pcm = speech((1, 2), (next_s, next_s + 1), length_s=5)
        assert len(cut(pcm, hangover_ms)) == num_utterances


def test_an_utterance_keeps_its_margins_as_far_as_the_recording_goes() -> None:
    assert cut(speech((1, 2), length_s=4)) == [(int(0.7 * 16000), int(2.1 * 16000))]
    assert cut(speech((0, 2), length_s=2)) == [(0, 2 * 16000)]
    assert cut(speech((0, 2), length_s=2.013)) == [(0, int(2.013 * 16000))]


def test_speech_longer_than_the_window_is_cut_equally_in_a_file_and_live(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pcm = speech((1, 24), length_s=26)
    spans = cut(pcm)
    assert [end - start <= WINDOW for start, end in spans] == [True] * 3
    np.testing.assert_array_equal(asked_live(pcm)[0], pcm[slice(*spans[0])])
    assert spans[0] == (int(0.7 * 16000), int(10.6 * 16000))
    assert [start for start, _ in spans[1:]] == [end for _, end in spans[:-1]]  # no overlaps
    assert caplog.text.count("speech without a pause for 9.6 s, the longest question") >= 3


def test_a_button_held_beyond_the_window_ends_the_question_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stage = Stage((1, 40), settings=LoopSettings(push_to_talk=True))
    stage.loop.tell(Command.PRESS)
    stage.run_until(29)
    assert not caplog.records
    stage.run_until(31)
    assert "speech without a pause for 29.6 s, the longest question" in caplog.text


def test_a_click_is_not_an_utterance() -> None:
    assert cut(speech((1, 1.04), length_s=3)) == []


def test_a_file_without_speech_is_refused_by_its_name(tmp_path: Path) -> None:
    with WavWriter(tmp_path / "silent.wav", 48000) as writer:
        writer.write(np.zeros(48000, np.float32))
    with pytest.raises(AudioError, match=r"silent\.wav: no speech heard in 1\.0 s"):
        read_utterances(tmp_path / "silent.wav", WINDOW)


@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_a_question_is_one_utterance(path: Path) -> None:
    (utterance,) = read_utterances(path, WINDOW)
    assert 0.6 * len(read_wav(path).pcm) < len(utterance) <= len(read_wav(path).pcm)
