"""The tiny checkpoint's course in a few steps per part: the files for the next part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deeptalk_edge.training.tiny import train as course
from deeptalk_edge.training.tiny.corpus import Clips, Corpus, Utterance
from deeptalk_edge.training.tiny.dataset import DatasetSettings
from deeptalk_edge.training.tiny.domain import Split, answers, questions
from deeptalk_edge.training.tiny.listening import HearingPlan
from deeptalk_edge.training.tiny.shape import AUDIO_EXPERT_COUNTS
from deeptalk_edge.training.tiny.stages import HeardMemory
from deeptalk_edge.training.tiny.tokens import TINY_CODEC
from deeptalk_edge.training.tiny.train import TrainSettings, Workshop
from deeptalk_edge.training.tiny.units import Unit, UnitVoice, unit_names
from deeptalk_edge.training.tiny.voices import ANSWER_VOICE

pytestmark = pytest.mark.slow  # 15 s in all

SETTINGS = replace(
    TrainSettings(),
    hearing=HearingPlan(batch_size=2, phone_layer=1, num_steps=2),
    dataset=DatasetSettings(num_heard=4, num_typed=4),
    speaking_steps=1,
    decoder_steps=4,
)


def workshop() -> Workshop:
    rng = np.random.default_rng(0)
    asked = [question for question in questions() if not question.is_held_out][:8]
    pcm = rng.integers(-3000, 3000, len(asked) * 8000).astype(np.int16)
    clips = Clips(pcm, np.arange(len(asked) + 1) * 8000, 16000)
    corpus = Corpus(
        seed=0,
        utterances=tuple(
            Utterance(
                question=each.text,
                answer=each.answer,
                intent=each.intent,
                key=each.key,
                split=Split.TRAIN,
                is_test=False,
                voice=ANSWER_VOICE,
            )
            for each in asked
        ),
        questions=clips,
        answer_texts=(),
        answers=clips,
        phones={word: list(word) for each in asked for word in each.text.split()},
    )
    units = UnitVoice(
        {
            name: Unit(
                codes=rng.integers(0, TINY_CODEC.codebook_size, (2 * len(name.split()), 7)),
                word_frames=tuple(range(0, 2 * len(name.split()), 2)),
                pcm=np.zeros(1, np.int16),
            )
            for name in unit_names(answers())
        }
    )
    return Workshop(corpus, units, TINY_CODEC, SETTINGS, "cpu")


@pytest.fixture(scope="module")
def shop() -> Workshop:
    return workshop()


@pytest.fixture(scope="module")
def work(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the parts before the last are made."""
    work = tmp_path_factory.mktemp("work")
    course.learn_to_hear(shop, work)
    course.learn_to_speak(shop, work)
    course.remember_questions(shop, work)
    return work


def test_the_encoder_and_the_rest_are_trained_separately(shop: Workshop, work: Path) -> None:
    ear, rest = load_file(work / "ear.safetensors"), load_file(work / "speaking.safetensors")
    fresh = dict(shop.new_model().named_parameters())
    assert {*ear, *rest} == set(fresh)
    assert all(name.startswith(course.EAR) for name in ear)
    assert not any(name.startswith(course.EAR) for name in rest)
    unmoved = {name for name in ear if torch.equal(ear[name], fresh[name])}
    assert unmoved == {"model.audio_encoder.embed_positions.weight"}
    assert not any(torch.equal(rest[name], fresh[name]) for name in rest if "embed" in name)


def test_every_training_question_is_remembered(shop: Workshop, work: Path) -> None:
    heard = HeardMemory.load(work / "heard.safetensors", "cpu")
    assert sorted(heard.spans) == sorted(shop.pool.members)


def test_an_existing_part_is_kept(shop: Workshop, work: Path) -> None:
    places = [work / f"{name}.safetensors" for name in ("ear", "speaking", "heard")]
    stamps = [place.stat().st_mtime_ns for place in places]
    again = [course.learn_to_hear, course.learn_to_speak, course.remember_questions]
    assert [part(shop, work) for part in again] == places
    assert [place.stat().st_mtime_ns for place in places] == stamps


def test_the_last_part_splits_the_experts_and_keeps_the_encoder(
    shop: Workshop, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(course, "SPLIT_BATCHES", 1)
    trained = []
    monkeypatch.setattr(
        course,
        "_train_stage",
        lambda model, shop, memory, stage, first, num_steps, work: trained.append(
            (stage.value, first, num_steps)
        ),
    )
    model = course.learn_to_answer(shop, work)
    split = course.read_split(work)
    assert [len(layer) for layer in split] == list(AUDIO_EXPERT_COUNTS)
    ear = load_file(work / "ear.safetensors")
    learnt = dict(model.named_parameters())
    assert all(torch.equal(ear[name], learnt[name]) for name in ear)
    assert trained == [("align", 1, 1), ("audio", 2, 1), ("text", 3, 1), ("joint", 4, 3)]


def test_a_shorter_course_has_at_least_four_steps_a_part() -> None:
    short = TrainSettings().scaled(0.0)
    assert (short.hearing.num_steps, short.speaking_steps, short.decoder_steps) == (4, 4, 4)
    half = TrainSettings().scaled(0.5)
    assert (half.speaking_steps, half.decoder_steps) == (1250, 1600)
