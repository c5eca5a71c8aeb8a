"""The generation loop on a model of random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deeptalk_edge.model.prompt import speak_as
from deeptalk_edge.model.rows import AnswerRows, Ids, codec_columns, text_rows
from deeptalk_edge.training.generate import Answer, Mode, Sampling, generate
from deeptalk_edge.training.model import DeepTalk
from tests.specs import PLAIN
from tests.training.random_models import random_model

MAX_ROWS = 14
VOCABULARY = PLAIN.vocabulary


@pytest.fixture(scope="module")
def model() -> DeepTalk:
    return random_model(PLAIN)


def _prompts(num_questions: int, length: int = 5) -> Ids:
    ids = np.random.default_rng(1).integers(0, 30, (num_questions, length))
    return np.stack([text_rows(VOCABULARY, row) for row in ids])


@torch.inference_mode()
def _literal(model: DeepTalk, prompt: Ids, mode: Mode) -> tuple[list[int], list[Ids]]:
    """The same greedy answer without a cache: all rows run again at every step."""
    items = [speak_as(VOCABULARY, prompt, "ANS_A"), prompt]
    answer, text, frames = AnswerRows(VOCABULARY), [], []
    silent = codec_columns(VOCABULARY, VOCABULARY.pad_audio)
    for _ in range(MAX_ROWS):
        spoken, written = (model(torch.from_numpy(rows)[None])[0, -1] for rows in items)
        texts = model.text_logits(written if mode == "batch-parallel" else spoken)
        text_id, code_ids = int(texts.argmax()), model.code_logits(spoken).argmax(-1).numpy()
        if not answer.is_text_done:
            text.append(text_id)
        row, frame = answer.push(text_id, code_ids)
        if frame is not None:
            frames.append(frame)
        if answer.is_done:
            break
        rows = (row, np.append(silent, row[-1]))
        items = [np.concatenate([item, r[None]]) for item, r in zip(items, rows, strict=True)]
    return text, frames


@pytest.mark.parametrize("mode", ["batch-parallel", "single"])
def test_cached_decoding_equals_decoding_from_scratch(model: DeepTalk, mode: Mode) -> None:
    prompt = _prompts(1)
    text, frames = _literal(model, prompt[0], mode)
    answer = generate(model, prompt, speaker="ANS_A", mode=mode, max_rows=MAX_ROWS)[0]
    assert answer.text_ids == text
    np.testing.assert_array_equal(answer.frames, np.array(frames))


def test_the_modes_differ(model: DeepTalk) -> None:
    """Otherwise the test above could not tell the modes apart."""
    parallel, single = (
        generate(model, _prompts(1), speaker="ANS_A", mode=mode, max_rows=MAX_ROWS)[0].text_ids
        for mode in ("batch-parallel", "single")
    )
    assert parallel != single


def test_questions_answered_together_get_the_answers_they_get_alone(model: DeepTalk) -> None:
    prompts = _prompts(3)
    together = generate(model, prompts, speaker="ANS_A", max_rows=MAX_ROWS)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = generate(model, prompt[None], speaker="ANS_A", max_rows=MAX_ROWS)[0]
        assert answer.text_ids == alone.text_ids
        np.testing.assert_array_equal(answer.frames, alone.frames)


def test_a_cut_answer_is_marked_as_incomplete(model: DeepTalk) -> None:
    answer: Answer = generate(model, _prompts(1), speaker="ANS_A", max_rows=3)[0]
    assert not answer.is_complete
    assert answer.frames.shape == (0, VOCABULARY.num_codebooks)


def test_sampling_is_repeatable_and_the_seed_matters(model: DeepTalk) -> None:
    def sampled(seed: int) -> list[int]:
        sampling = Sampling(text_top_k=8, audio_top_k=8, temperature=2.0, seed=seed)
        prompt = _prompts(1)
        return generate(model, prompt, speaker="ANS_A", sampling=sampling, max_rows=MAX_ROWS)[
            0
        ].text_ids

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)


def test_a_top_k_above_the_vocabulary_draws_from_all_of_it(model: DeepTalk) -> None:
    sampling = Sampling(text_top_k=10**6, audio_top_k=10**6, temperature=3.0)
    answer = generate(model, _prompts(1), speaker="ANS_A", sampling=sampling, max_rows=MAX_ROWS)[0]
    assert len(set(answer.text_ids)) > 1


def test_the_speaker_changes_the_speech_and_not_the_text(model: DeepTalk) -> None:
    """In batch-parallel mode text comes from the item without a speaker."""
    ours, theirs = (
        generate(model, _prompts(1), speaker=name, max_rows=MAX_ROWS)[0]
        for name in ("ANS_A", "M29")
    )
    assert ours.text_ids == theirs.text_ids
    assert not np.array_equal(ours.frames, theirs.frames)
