"""The independent recogniser: what it hears in composed speech, and which words it knows."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.sound import recogniser
from deeptalk_edge.sound.recogniser import Array, SentenceRecogniser, WordRecogniser

pytest.importorskip("pocketsphinx")

SENTENCES = ("five tickets to vienna that will be fifty pounds", "calling room seven six five")


@pytest.fixture(scope="module")
def composed() -> list[Array]:
    """Each sentence word by word with pauses of 40 ms, as announcements are composed, and a hiss at
    -61 dBFS."""
    if not shutil.which("flite"):
        pytest.skip("flite is not installed")
    from deeptalk_edge.training.tiny.voices import ANSWER_VOICE, speak

    pause, rng = np.zeros(960, np.int16), np.random.default_rng(0)
    sounds = []
    for sentence in SENTENCES:
        words = [speak(word, ANSWER_VOICE, rate_hz=24000) for word in sentence.split()]
        pcm = np.concatenate([part for word in words for part in (word, pause)])
        sounds.append(np.asarray((pcm + rng.normal(0, 30, len(pcm))) / 32768, np.float32))
    return sounds


def test_a_pause_is_no_word(composed: list[Array]) -> None:
    hear = WordRecogniser([*SENTENCES, "at eight a gate is next"], 24000)
    assert [hear(sound) for sound in composed] == [hear.fold(s) for s in SENTENCES]


def test_no_word_is_heard_in_silence() -> None:
    assert WordRecogniser(["hello"], 24000)(np.zeros(24000, np.float32)) == ""


def test_words_that_sound_alike_count_as_one() -> None:
    hear = WordRecogniser(["two tickets to rome", "for four"], 24000)
    assert hear.fold("two to too") == "to to too", "only words of the sentences are folded"
    assert hear.fold("four for rome") == "for for rome"


def test_one_of_the_sentences_is_heard_or_nothing(composed: list[Array]) -> None:
    hear = SentenceRecogniser(SENTENCES, 24000)
    assert [hear(sound) for sound in composed] == list(SENTENCES)
    assert hear(np.zeros(24000, np.float32)) == ""


def test_a_word_that_the_dictionary_lacks_is_heard_if_it_can_be_pronounced(
    composed: list[Array],
) -> None:
    sentence = SENTENCES[1].replace("seven", "qqxzw")
    assert SentenceRecogniser([sentence, "gate one"], 24000)(composed[1]) != sentence
    hear = SentenceRecogniser([sentence, "gate one"], 24000, lambda word: "S EH V AH N")
    assert hear(composed[1]) == sentence


def test_a_word_without_phones_is_never_heard() -> None:
    assert WordRecogniser(["gate ' one"], 24000, lambda word: "").fold("gate ' one") == "gate ' one"


@pytest.mark.parametrize("sentences", [[], [""], ["qqxzw"]])
@pytest.mark.parametrize("kind", [SentenceRecogniser, WordRecogniser])
def test_no_known_word_is_refused(
    kind: type[SentenceRecogniser | WordRecogniser], sentences: list[str]
) -> None:
    with pytest.raises(SettingsError, match="knows none"):
        kind(sentences, 24000)


def test_a_recogniser_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(recogniser, "import_module", fail)
    with pytest.raises(SettingsError, match="pip install pocketsphinx"):
        WordRecogniser(["hello"], 24000)
