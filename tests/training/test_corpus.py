"""The corpus: no voice or wording of a held-out set leaks into training, and files are checked."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.errors import ArtifactError, AudioError
from deeptalk_edge.training.tiny import corpus as corpus_module
from deeptalk_edge.training.tiny.corpus import Clips, load_corpus, synthesise
from deeptalk_edge.training.tiny.domain import Split, questions
from deeptalk_edge.training.tiny.voices import (
    ANSWER_VOICE,
    Pcm,
    Voice,
    held_out_voice,
    phones_of,
    speak,
    training_voice,
)

needs_synthesisers = pytest.mark.skipif(
    not (shutil.which("flite") and shutil.which("espeak-ng")),
    reason="flite and espeak-ng are not installed",
)


@pytest.fixture
def silent_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The whole plan, with a synthesiser whose clips are as long as their texts."""

    def pretend(text: str, voice: Voice, *, rate_hz: int) -> Pcm:
        return np.full(len(text), rate_hz // 1000, np.int16)

    monkeypatch.setattr(corpus_module, "speak", pretend)
    monkeypatch.setattr(corpus_module, "phones_of", list)
    monkeypatch.setattr(corpus_module, "need_synthesisers", lambda: None)
    synthesise(tmp_path / "corpus", seed=0, workers=2)
    return tmp_path / "corpus"


def test_the_sets_share_no_voice_or_wording(silent_corpus: Path) -> None:
    corpus = load_corpus(silent_corpus)
    held_out = {question.text for question in questions() if question.is_held_out}
    train = [corpus.utterances[i] for i in corpus.select(Split.TRAIN, is_test=False)]
    trained_voices = {utterance.voice.name for utterance in train}
    assert not held_out & {utterance.question for utterance in train}
    for split in (Split.NEW_VOICE, Split.NEW_COMBINATION, Split.BOTH_NEW):
        for is_test in (False, True):
            chosen = [corpus.utterances[i] for i in corpus.select(split, is_test=is_test)]
            assert len(chosen) > 50
            voices = {utterance.voice.name for utterance in chosen}
            assert voices.isdisjoint(trained_voices) is (split is not Split.NEW_COMBINATION)
            is_new_text = split is not Split.NEW_VOICE
            assert {u.question in held_out for u in chosen} == {is_new_text}


def test_nothing_of_training_is_marked_as_test(silent_corpus: Path) -> None:
    assert not load_corpus(silent_corpus).select(Split.TRAIN, is_test=True)


def test_every_word_that_is_asked_has_its_phones(silent_corpus: Path) -> None:
    corpus = load_corpus(silent_corpus)
    assert corpus.phones["gate"] == ["g", "a", "t", "e"]  # the fixture spells instead
    asked = {word for utterance in corpus.utterances for word in utterance.question.split()}
    assert asked == corpus.phones.keys()


def test_clips_are_in_the_order_of_the_plan(silent_corpus: Path) -> None:
    corpus = load_corpus(silent_corpus)
    for index in (0, 100, len(corpus.utterances) - 1):
        assert len(corpus.questions[index]) == len(corpus.utterances[index].question)
    for index, text in enumerate(corpus.answer_texts):
        assert len(corpus.answers[index]) == len(text)


def test_a_seed_determines_every_voice(silent_corpus: Path, tmp_path: Path) -> None:
    first = load_corpus(silent_corpus)
    again = synthesise(tmp_path / "again", seed=0, workers=1)
    other = synthesise(tmp_path / "other", seed=1, workers=1)
    assert again.utterances == first.utterances
    assert other.utterances != first.utterances


def test_a_corpus_that_does_not_fit_its_plan_is_refused(silent_corpus: Path) -> None:
    path = silent_corpus / "corpus.json"
    plan = json.loads(path.read_text())
    plan["answer_texts"].pop()
    path.write_text(json.dumps(plan))
    with pytest.raises(ArtifactError, match=r"do not match corpus\.json"):
        load_corpus(silent_corpus)
    path.unlink()
    with pytest.raises(ArtifactError, match="synthesise it again"):
        load_corpus(silent_corpus)


def test_a_clip_outside_the_recording_is_an_error() -> None:
    clips = Clips(np.zeros(5, np.int16), np.array([0, 2, 5]), 16000)
    assert [len(clips[0]), len(clips[1])] == [2, 3]
    with pytest.raises(IndexError):
        clips[2]
    with pytest.raises(IndexError):
        clips[-1]


def test_training_and_held_out_voices_never_meet() -> None:
    rng = random.Random(0)
    trained = {training_voice(rng).name for _ in range(2000)}
    held_out = {held_out_voice(rng).name for _ in range(2000)}
    assert len(trained) > 200
    assert len(held_out) == 3 * 4 + 1
    assert not trained & held_out


@needs_synthesisers
@pytest.mark.parametrize(
    "voice",
    [
        ANSWER_VOICE,
        Voice(program="flite", name="kal", rate=1.1, tape_speed=1.1),
        Voice(program="espeak-ng", name="en-gb+f2", rate=0.9, pitch=60),
    ],
)
def test_speech_is_trimmed_levelled_and_repeatable(voice: Voice) -> None:
    speech = speak("gate four", voice, rate_hz=16000)
    assert np.array_equal(speech, speak("gate four", voice, rate_hz=16000))
    assert 0.4 < len(speech) / 16000 < 2.0
    assert abs(np.abs(speech).max() - 0.6 * 32767) < 2
    loud = np.flatnonzero(np.abs(speech) > 300) / 16000
    assert loud[0] < 0.1
    assert len(speech) / 16000 - loud[-1] < 0.1


@needs_synthesisers
def test_phones_are_those_of_the_american_dictionary() -> None:
    assert phones_of("eight") == ["ey", "t"]
    assert phones_of("gate") == ["g", "ey", "t"]


@needs_synthesisers
def test_flite_speaks_at_the_requested_pitch() -> None:
    def pitch_hz(f0_hz: int) -> float:
        voice = Voice(program="flite", name="kal", f0_hz=f0_hz)
        speech = speak("one", voice, rate_hz=16000)[3000:6000].astype(np.float64)
        periods = np.correlate(speech, speech, "full")[len(speech) - 1 :]
        return float(16000 / (84 + np.argmax(periods[84:230])))

    assert pitch_hz(90) < 0.75 * pitch_hz(160)


@needs_synthesisers
def test_a_voice_without_sound_is_an_error() -> None:
    with pytest.raises(AudioError, match="says nothing"):
        speak(" ", ANSWER_VOICE, rate_hz=16000)
