"""A question that was not understood gets a spoken line and leaves no turn."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.bundle import understanding as files
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import AudioError, SettingsError
from deeptalk_edge.export.bundle import ExportSettings, export_bundle
from deeptalk_edge.model.understanding import Score
from deeptalk_edge.runtime.conversation import Conversation
from deeptalk_edge.runtime.events import AudioChunk, NotUnderstood, TextPiece, Transcript, TurnDone
from deeptalk_edge.runtime.settings import ConversationSettings
from deeptalk_edge.runtime.understanding import NO_HEAD, Judgement, UnderstandingSettings
from deeptalk_edge.sound.wav import WavWriter, read_wav, resample
from tests.places import TINY

QUESTION = sorted((TINY / "questions").glob("*.wav"))[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    place = tmp_path_factory.mktemp("understanding") / "bundle"
    export_bundle(TINY, place, ExportSettings())
    return Bundle.open(place)


@pytest.fixture(scope="module")
def music() -> np.ndarray:
    """Three seconds of a repeated plucked chord."""
    t = np.arange(16_000 * 3) / 16_000
    tones = sum(np.sin(2 * np.pi * hz * t) for hz in (220.0, 277.2, 329.6, 440.0))
    return np.asarray(0.1 * tones * np.exp(-4 * (t % 0.4)), np.float32)


def talk_of(bundle: Bundle, **changes: object) -> Conversation:
    understanding = UnderstandingSettings(**changes)  # type: ignore[arg-type]
    settings = dataclasses.replace(ConversationSettings.of(bundle), understanding=understanding)
    return Conversation(bundle, settings)


@pytest.fixture(scope="module")
def question() -> np.ndarray:
    return resample(read_wav(QUESTION), 16_000).pcm


def test_music_gets_the_bundles_spoken_line_and_adds_no_turn(
    tiny: Bundle, music: np.ndarray
) -> None:
    with talk_of(tiny) as talk:
        events = list(talk.ask(music))
        assert [type(event) for event in events] == [
            Transcript,
            NotUnderstood,
            AudioChunk,
            TurnDone,
        ]
        refusal, sound, done = events[1:]
        assert isinstance(refusal, NotUnderstood)
        assert isinstance(sound, AudioChunk)
        assert isinstance(done, TurnDone)
        np.testing.assert_array_equal(sound.pcm, read_wav(tiny.file(files.LINE)).pcm)
        assert (done.text, done.metrics.stopped) == ("", "not_understood")
        assert done.metrics.understood_p == refusal.understood_p < 0.33
        assert talk.history.num_turns == 0


def test_an_understood_question_is_answered_as_without_judging(
    tiny: Bundle, question: np.ndarray
) -> None:
    answers = []
    for refuses in (True, False):
        with talk_of(tiny, refuses=refuses) as talk:
            events = list(talk.ask(question))
        text = "".join(event.text for event in events if isinstance(event, TextPiece))
        pcm = np.concatenate([event.pcm for event in events if isinstance(event, AudioChunk)])
        answers.append((text, pcm))
    assert answers[0][0] == answers[1][0] != ""
    np.testing.assert_array_equal(answers[0][1], answers[1][1])


def test_a_refused_question_changes_no_later_answer(
    tiny: Bundle, music: np.ndarray, question: np.ndarray
) -> None:
    texts = []
    for first in ((), (music,)):
        with talk_of(tiny) as talk:
            for pcm in first:
                list(talk.ask(pcm))
            texts.append([e for e in talk.ask(question) if isinstance(e, TextPiece)])
    assert texts[0] == texts[1] != []


def test_the_words_of_a_question_come_first(tiny: Bundle, question: np.ndarray) -> None:
    with talk_of(tiny) as talk:
        transcript = next(iter(talk.ask(question)))
    assert isinstance(transcript, Transcript)
    assert transcript.text == "i would like eight tickets to berlin"
    assert transcript.confidence is not None
    assert 0.5 < transcript.confidence <= 1


def test_silence_or_a_wav_may_replace_the_spoken_line(
    tiny: Bundle, music: np.ndarray, tmp_path: Path
) -> None:
    own = tmp_path / "own.wav"
    with WavWriter(own, 24_000) as writer:
        writer.write(np.full(2400, 0.25, np.float32))
    for line, samples in (("silence", 0), (own, 2400)):
        with talk_of(tiny, line=line) as talk:
            sounds = [event for event in talk.ask(music) if isinstance(event, AudioChunk)]
        assert sum(sound.pcm.size for sound in sounds) == samples


def test_a_line_that_cannot_be_played_is_refused_at_once(tiny: Bundle, tmp_path: Path) -> None:
    other = tmp_path / "other.wav"
    with WavWriter(other, 16_000) as writer:
        writer.write(np.zeros(160, np.float32))
    with pytest.raises(SettingsError, match="16000 Hz, expected the codec's 24000 Hz"):
        talk_of(tiny, line=other)
    with pytest.raises(AudioError, match=r"gone\.wav"):
        talk_of(tiny, line=tmp_path / "gone.wav")


def test_the_threshold_can_be_set(tiny: Bundle, music: np.ndarray, question: np.ndarray) -> None:
    with talk_of(tiny, least_p=0.0) as talk:
        assert not any(isinstance(event, NotUnderstood) for event in talk.ask(music))
    with talk_of(tiny, least_p=1.0) as talk:
        assert any(isinstance(event, NotUnderstood) for event in talk.ask(question))


@pytest.fixture(scope="module")
def without_head(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same bundle without its word head and questions, with the score that is fitted then."""
    place = tmp_path_factory.mktemp("headless") / "bundle"
    shutil.copytree(tiny.path, place)
    path = place / files.HEADER
    header = {**json.loads(path.read_text()), "words": [], "questions": []}
    weights = {"entropy": -2.63, "distance": -3.3}
    late = {"bias": 15.13, "weights": weights, "least_p": 0.154}
    header |= {"before_prefill": None, "before_sound": late, "complete": None}
    path.write_text(json.dumps(header))
    return Bundle(place, tiny.manifest)


def test_without_a_word_head_sound_waits_for_the_first_rows(
    without_head: Bundle, music: np.ndarray, question: np.ndarray
) -> None:
    with talk_of(without_head) as talk:
        refused = list(talk.ask(music))
        assert refused[0] == Transcript(None, None, NO_HEAD)
        sounds = [event for event in refused if isinstance(event, AudioChunk)]
        assert any(isinstance(event, NotUnderstood) for event in refused)
        assert len(sounds) == 1  # only the spoken line
        assert not any(isinstance(event, TextPiece) for event in refused)
        assert talk.history.num_turns == 0
        heard = "".join(e.text for e in talk.ask(question) if isinstance(e, TextPiece))
    with talk_of(without_head, refuses=False) as talk:
        assert heard == "".join(e.text for e in talk.ask(question) if isinstance(e, TextPiece))


def test_a_bundle_without_understanding_answers_every_question(
    bundle: Bundle, music: np.ndarray
) -> None:
    with Conversation(bundle) as talk:
        events = list(talk.ask(music[:16_000]))
    assert not any(isinstance(event, NotUnderstood) for event in events)
    assert events[-1].metrics.understood_p is None  # type: ignore[union-attr]


EARLY, LATE = Score(0.0, {"distance": 1.0}, 0.3), Score(0.0, {"entropy": 1.0}, 0.2)


def judgement(distance: float, **changes: object) -> Judgement:
    header = files.Header(before_prefill=EARLY, before_sound=LATE)
    settings = UnderstandingSettings(**changes)  # type: ignore[arg-type]
    return Judgement(Transcript(None, None, None), header, settings, {"distance": distance})


@pytest.mark.parametrize(
    ("distance", "is_refused", "waits"),
    [(-2.0, True, True), (0.0, False, True), (4.0, False, False)],
    ids=["no question", "in doubt", "certainly a question"],
)
def test_sound_waits_for_the_first_rows_only_in_doubt(
    distance: float, is_refused: bool, waits: bool
) -> None:
    known = judgement(distance)
    assert known.is_refused == is_refused
    assert known.waits_for_entropy == waits
    known.add_entropy(1e-3)
    assert known.right_p == pytest.approx(0.0474, abs=1e-3)
    assert known.is_refused == (distance < 4)
    assert not known.waits_for_entropy


def test_refusing_nothing_keeps_the_probabilities() -> None:
    known = judgement(-2.0, refuses=False)
    known.add_entropy(1e-3)
    assert not known.is_refused
    assert not known.waits_for_entropy
    assert known.understood_p == pytest.approx(0.119, abs=1e-3)
    assert known.right_p == pytest.approx(0.0474, abs=1e-3)


def test_a_chosen_threshold_holds_for_both_scores() -> None:
    assert judgement(0.0, least_p=0.6).is_refused
    known = judgement(0.0, least_p=0.04)
    known.add_entropy(1e-3)
    assert not known.is_refused
