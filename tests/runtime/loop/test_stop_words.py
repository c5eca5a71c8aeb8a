"""A stop word over an answer ends it at once; other words do not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from deeptalk_edge.cli import main
from deeptalk_edge.errors import SettingsError
from deeptalk_edge.model.features import RATE_HZ
from deeptalk_edge.runtime.audio.echo import NoCanceller
from deeptalk_edge.runtime.audio.end_of_turn import FixedHangover
from deeptalk_edge.runtime.audio.stop_words import SphinxSpotter
from deeptalk_edge.runtime.audio.wav_port import WavPort
from deeptalk_edge.runtime.events import (
    AnswerResumed,
    Interrupted,
    LiveEvent,
    SpeechEnded,
    TurnDone,
)
from deeptalk_edge.runtime.loop.fake_talker import FakeTalker
from deeptalk_edge.runtime.loop.live import Hearing, LiveConversation
from deeptalk_edge.runtime.loop.settings import LoopSettings
from deeptalk_edge.runtime.loop.signals import StopWordHeard
from deeptalk_edge.runtime.loop.states import State
from deeptalk_edge.runtime.loop.stop_listener import StopListener
from deeptalk_edge.sound.wav import WavWriter, read_wav, resample
from tests.runtime.loop.scenes import LoudnessDetector, Stage
from tests.runtime.sounds import silence, voice

Array = NDArray[np.float32]

FRAME = 320  # samples


class LoudnessSpotter:
    """Finds the word after this much loud sound since `begin`."""

    def __init__(self, word_s: float) -> None:
        self._word_samples = word_s * RATE_HZ
        self._loud_samples = 0
        self.num_begun = self.num_pieces = 0

    def begin(self) -> None:
        self._loud_samples = 0
        self.num_begun += 1

    def hears(self, pcm: Array) -> bool:
        self.num_pieces += 1
        self._loud_samples += int(np.count_nonzero(pcm > 0.05))
        return self._loud_samples >= self._word_samples


def stage(*script: tuple[float, float], word_s: float = 0.14) -> tuple[Stage, LoudnessSpotter]:
    """The answer sounds from 2.5 to 4.5 s."""
    spotter = LoudnessSpotter(word_s)
    return Stage((1.0, 2.0), *script, spotter=spotter), spotter


def test_a_stop_word_ends_the_answer_before_voice_alone_would() -> None:
    scene, _ = stage((3.5, 3.7))
    scene.run_until(9)
    assert scene.when(Interrupted) == pytest.approx([3.66])  # 260 ms of voice: 3.76
    assert not scene.played_between(3.70, 9).any()
    (cut,) = scene.of(TurnDone)
    assert 0 < len(cut.text.split()) < 6
    assert scene.talker.history == [cut.text]
    assert cut.voice.stop_ms == pytest.approx(140 + 20 + 40)
    assert scene.state() is State.LISTENING
    assert not scene.of(AnswerResumed)
    assert len(scene.of(SpeechEnded)) == 1  # the word is not a question


@pytest.mark.parametrize(
    ("voice_s", "word_s", "state"),
    [
        (0.2, 0.14, State.OVERLAP),
        (0.34, 0.30, State.INTERRUPTED),
        (0.8, 0.50, State.USER_SPEAKING),
    ],
)
def test_a_stop_word_counts_however_long_it_is(voice_s: float, word_s: float, state: State) -> None:
    scene, _ = stage((3.5, 3.5 + voice_s), word_s=word_s)
    scene.run_until(3.5 + word_s)
    assert scene.state() is state
    scene.run_until(3.5 + word_s + 0.04)
    assert scene.state() is State.STOPPED_BY_WORD
    scene.run_until(9)
    assert len(scene.of(TurnDone)) == 1
    assert scene.state() is State.LISTENING


def test_a_user_who_continues_after_a_stop_word_is_answered() -> None:
    scene, _ = stage((3.5, 3.7), (3.8, 4.8))
    scene.run_until(9)
    cut, second = scene.of(TurnDone)
    assert len(cut.text.split()) < 6
    assert second.text == "1.0 1.1 1.2 1.3 1.4 1.5"
    assert scene.when(Interrupted) == pytest.approx([3.66])


def test_a_stop_word_that_is_recognised_late_does_not_end_the_next_answer() -> None:
    scene, _ = stage((3.5, 4.5), word_s=9)
    scene.run_until(4.0)
    word = StopWordHeard(scene.loop.loop.opened)
    scene.run_until(5.5)
    assert scene.state() is State.SPEAKING
    scene.loop.tell(word)
    scene.run_until(9)
    assert [done.text for done in scene.of(TurnDone)][1:] == ["1.0 1.1 1.2 1.3 1.4 1.5"]


def test_other_words_over_an_answer_have_no_effect_of_stop_words() -> None:
    (scene, _), plain = stage((3.5, 3.7), word_s=9), Stage((1.0, 2.0), (3.5, 3.7))
    scene.run_until(7)
    plain.run_until(7)
    np.testing.assert_array_equal(np.concatenate(scene.played), np.concatenate(plain.played))


def test_a_spotter_gets_only_the_first_second_of_an_overlap() -> None:
    scene, spotter = stage((3.5, 3.62), (5.5, 7.0), word_s=9)
    scene.run_until(3.5)
    assert spotter.num_begun == 0
    scene.run_until(7.5)
    assert spotter.num_begun == 1
    assert spotter.num_pieces == (300 + 1000) / 20  # the pre-roll, too


def test_one_stop_word_of_a_voice_is_enough() -> None:
    told: list[StopWordHeard] = []
    listener = StopListener(LoudnessSpotter(0.02), told.append)
    for voice_start in (320, 9600):
        listener.begin(voice_start)
        for _ in range(3):
            listener.push(np.full(FRAME, 0.1, np.float32))
    while listener.work():
        pass
    assert told == [StopWordHeard(320), StopWordHeard(9600)]


def spoken(word: str, place: Path) -> Array:
    """`word` between silences, in a quiet room."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed: apt install espeak-ng")
    path = place / "word.wav"
    subprocess.run(["espeak-ng", "-v", "en-us", "-w", str(path), word], check=True)
    pcm = np.pad(resample(read_wav(path), RATE_HZ).pcm, (4800, 4800))
    noise = np.random.default_rng(0).standard_normal(len(pcm), np.float32)
    return np.asarray(pcm + np.float32(1e-3) * noise, np.float32)


def is_heard(spotter: SphinxSpotter, pcm: Array) -> bool:
    spotter.begin()
    return any(spotter.hears(pcm[i : i + FRAME]) for i in range(0, len(pcm), FRAME))


@pytest.fixture(scope="module")
def sphinx() -> SphinxSpotter:
    return SphinxSpotter(["stop", "cancel"])


@pytest.mark.parametrize("word", ["stop", "cancel", "please stop it"])
def test_pocketsphinx_finds_a_stop_word(sphinx: SphinxSpotter, word: str, tmp_path: Path) -> None:
    assert is_heard(sphinx, spoken(word, tmp_path))


@pytest.mark.parametrize(
    "word", ["mhm", "yes", "okay", "right", "which way to platform eleven please"]
)
def test_pocketsphinx_finds_no_stop_word_in_other_words(
    sphinx: SphinxSpotter, word: str, tmp_path: Path
) -> None:
    assert not is_heard(sphinx, spoken(word, tmp_path))


def test_pocketsphinx_forgets_what_was_said_before(sphinx: SphinxSpotter, tmp_path: Path) -> None:
    assert is_heard(sphinx, spoken("stop", tmp_path))
    assert not is_heard(sphinx, spoken("okay", tmp_path))


@pytest.mark.parametrize("word", ["stoppitude", "be stoppitude", "", " "])
def test_a_word_that_pocketsphinx_does_not_know_is_refused(word: str) -> None:
    with pytest.raises(SettingsError, match="stop word"):
        SphinxSpotter([word])


def test_without_pocketsphinx_the_extra_is_named(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    command = ["run", "--bundle", str(bundle_path), "--mic", "--stop-word", "stop"]
    assert main([*command, "--no-echo-canceller"]) == 1
    assert "deeptalk-edge[stop-words]" in capsys.readouterr().err


def test_a_stop_word_ends_a_live_answer(tmp_path: Path) -> None:
    said = [silence(0.3), voice(0.7), silence(1.4), voice(0.2), silence(1.0)]
    with WavWriter(tmp_path / "said.wav", RATE_HZ) as writer:
        writer.write(np.concatenate(said))
    asked: list[Sequence[str]] = []

    def spotter(words: Sequence[str]) -> LoudnessSpotter:
        asked.append(words)
        return LoudnessSpotter(0.05)

    hearing = Hearing(
        detector=LoudnessDetector(),
        canceller=NoCanceller(),
        end_of_turn=FixedHangover(500),
        spotter=spotter,
    )
    port = WavPort(tmp_path / "said.wav")
    settings = LoopSettings(stop_words=("stop",))
    seen: list[LiveEvent] = []
    with LiveConversation(FakeTalker(), port, settings, hearing) as live:
        for event in live:
            seen.append(event)
            if isinstance(event, TurnDone):
                live.stop()
    assert asked == [("stop",)]
    assert [event for event in seen if isinstance(event, Interrupted)]
    assert len(seen[-1].text.split()) < 6  # type: ignore[union-attr]
