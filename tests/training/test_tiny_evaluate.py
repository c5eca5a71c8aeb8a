"""The kiosk's report: each question is asked once, and both recognisers read that answer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.tiny.corpus import Clips, Corpus, Samples, Utterance
from deeptalk_edge.training.tiny.evaluate import HELD_OUT, SetScore, evaluate
from deeptalk_edge.training.tiny.tokens import TINY_CODEC
from deeptalk_edge.training.tiny.units import Unit, UnitVoice
from deeptalk_edge.training.tiny.voices import ANSWER_VOICE

ROOMS = ("one", "two", "three", "four", "five")
NUM_QUESTIONS = 2 * len(ROOMS) * len(HELD_OUT)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Five rooms in each half of each set; question i is i + 1 samples long."""
    utterances = tuple(
        Utterance(
            question=f"call room {room}",
            answer=f"calling room {room}",
            intent="room",
            key=room,
            split=split,
            is_test=is_test,
            voice=ANSWER_VOICE,
        )
        for is_test in (False, True)
        for split in HELD_OUT
        for room in ROOMS
    )
    offsets = np.cumsum(np.arange(NUM_QUESTIONS + 1))
    questions = Clips(np.zeros(offsets[-1], np.int16), offsets, 16000)
    none = Clips(np.zeros(0, np.int16), np.zeros(1, np.int64), 24000)
    return Corpus(
        seed=0,
        utterances=utterances,
        questions=questions,
        answer_texts=(),
        answers=none,
        phones={},
    )


@pytest.fixture(scope="module")
def units() -> UnitVoice:
    frame = Unit(np.zeros((1, 7), np.int64), (0,), np.zeros(1, np.int16))
    return UnitVoice({name: frame for name in ("calling room", *ROOMS)})


@pytest.fixture(scope="module")
def codec() -> Snac:
    torch.manual_seed(0)
    return Snac(replace(TINY_CODEC, decoder_dim=32), with_encoder=False).eval()


class Kiosk:
    """Knows every answer; its sound is a level made from the question's number."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self.asked: list[int] = []
        self.heard_open: list[int] = []
        self.num_truths = 0

    def answer(self, question: Samples) -> tuple[str, Samples]:
        utterance = len(question) - 1
        self.asked.append(utterance)
        return self._corpus.utterances[utterance].answer, np.full(3, utterance, np.float32)

    def hear(self, samples: Samples) -> str:
        return self._corpus.utterances[int(samples[0])].answer

    def hear_freely(self, samples: Samples) -> str:
        """Misses the first word of answers, and every word of true codes."""
        if len(samples) != 3:
            self.num_truths += 1
            return ""
        self.heard_open.append(int(samples[0]))
        return self.hear(samples).partition(" ")[2]


@pytest.fixture
def kiosk(corpus: Corpus) -> Kiosk:
    return Kiosk(corpus)


@pytest.fixture
def scores(kiosk: Kiosk, corpus: Corpus, units: UnitVoice, codec: Snac) -> list[SetScore]:
    """The report of a kiosk that is right, with an open recogniser that makes errors."""
    return evaluate(
        kiosk.answer,
        corpus,
        units,
        codec,
        kiosk.hear,
        kiosk.hear_freely,
        is_test=True,
        open_every=2,
    )


def test_every_question_of_the_half_is_asked_once(scores: list[SetScore], kiosk: Kiosk) -> None:
    assert kiosk.asked == list(range(NUM_QUESTIONS // 2, NUM_QUESTIONS))
    assert [s.spoken.num_answers for s in scores] == [5, 5, 5]


def test_the_open_recogniser_reads_one_answer_in_so_many(
    scores: list[SetScore], kiosk: Kiosk
) -> None:
    assert kiosk.heard_open == [i for s in (15, 20, 25) for i in (s, s + 2, s + 4)]
    assert [s.opened.num_answers for s in scores] == [3, 3, 3]


def test_each_recogniser_scores_independently(scores: list[SetScore]) -> None:
    for s in scores:
        assert (s.text_exact, s.spoken.exact_rate, s.agreed) == (1, 1, 1)
        assert s.opened.word_error_rate == pytest.approx(1 / 3)


def test_the_ceiling_reads_the_true_codes_of_an_answer_once(
    scores: list[SetScore], kiosk: Kiosk
) -> None:
    assert [s.ceiling.word_error_rate for s in scores] == [1, 1, 1]
    assert kiosk.num_truths == 3


def test_only_every_nth_question_is_asked(
    kiosk: Kiosk, corpus: Corpus, units: UnitVoice, codec: Snac
) -> None:
    hear = kiosk.hear
    evaluate(kiosk.answer, corpus, units, codec, hear, lambda _: "", is_test=False, every=3)
    assert kiosk.asked == [0, 3, 5, 8, 10, 13]


def test_a_right_text_said_wrong_is_not_spoken_exactly(
    kiosk: Kiosk, corpus: Corpus, units: UnitVoice, codec: Snac
) -> None:
    def answer(question: Samples) -> tuple[str, Samples]:
        """Speaks the next room's number."""
        text, samples = kiosk.answer(question)
        return text, (samples + 1) % NUM_QUESTIONS

    scores = evaluate(
        answer, corpus, units, codec, kiosk.hear, kiosk.hear, is_test=False, open_every=5
    )
    assert [s.split for s in scores] == list(HELD_OUT)
    for s in scores:
        assert (s.text_exact, s.spoken.exact_rate, s.agreed) == (1, 0, 0)
        assert s.spoken.word_error_rate == pytest.approx(1 / 3)
