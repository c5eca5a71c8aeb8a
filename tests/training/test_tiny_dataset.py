"""The tiny model's batches follow the grid and never have held-out items."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from deeptalk_edge.model.prompt import Typed
from deeptalk_edge.model.rows import AnswerRows
from deeptalk_edge.model.spec import ModelSpec, TextAlignment
from deeptalk_edge.training.items import LENGTH_STEP, NO_FRAME, Batch
from deeptalk_edge.training.losses import IGNORE
from deeptalk_edge.training.tiny.corpus import Clips, Corpus, Utterance
from deeptalk_edge.training.tiny.dataset import (
    DatasetSettings,
    ItemWriter,
    TinyBatches,
    UtterancePool,
)
from deeptalk_edge.training.tiny.domain import (
    Split,
    answers,
    answers_never_trained,
    questions,
    vocabulary,
)
from deeptalk_edge.training.tiny.shape import SYSTEM_PROMPT, tiny_spec, tiny_template
from deeptalk_edge.training.tiny.tokenizer import decode, encode, train_tokenizer
from deeptalk_edge.training.tiny.tokens import TINY_CODEC
from deeptalk_edge.training.tiny.units import Unit, UnitVoice, unit_names
from deeptalk_edge.training.tiny.voices import held_out_voice, training_voice

NUM_STEPS = 24
FRAMES = 90  # frames of every utterance


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(vocabulary(), [SYSTEM_PROMPT])


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Every question once, in a voice that suits its split."""
    rng, utterances = random.Random(0), []
    for i, question in enumerate(questions()):
        split = Split.BOTH_NEW if question.is_held_out else Split.TRAIN
        if split is Split.TRAIN and i % 9 == 0:
            split = Split.NEW_VOICE
        utterances.append(
            Utterance(
                question=question.text,
                answer=question.answer,
                intent=question.intent,
                key=question.key,
                split=split,
                is_test=False,
                voice=training_voice(rng) if split is Split.TRAIN else held_out_voice(rng),
            )
        )
    silence = Clips(np.zeros(0, np.int16), np.zeros(1, np.int64), 16000)
    return Corpus(
        seed=0,
        utterances=tuple(utterances),
        questions=silence,
        answer_texts=(),
        answers=silence,
        phones={},
    )


@pytest.fixture(scope="module")
def units() -> UnitVoice:
    """Units of random codes, two frames per word."""
    rng = np.random.default_rng(0)
    return UnitVoice(
        {
            name: Unit(
                codes=rng.integers(0, TINY_CODEC.codebook_size, (2 * len(name.split()), 7)),
                word_frames=tuple(range(0, 2 * len(name.split()), 2)),
                pcm=np.zeros(1, np.int16),
            )
            for name in unit_names(answers())
        }
    )


def _spec(tokenizer: Tokenizer, alignment: TextAlignment = "word") -> ModelSpec:
    return tiny_spec(tokenizer, TINY_CODEC, alignment)


def _batches(
    corpus: Corpus,
    units: UnitVoice,
    tokenizer: Tokenizer,
    settings: DatasetSettings | None = None,
) -> TinyBatches:
    spec = _spec(tokenizer)
    lengths = np.arange(len(corpus.utterances))
    return TinyBatches(
        corpus,
        UtterancePool(corpus, lengths),
        ItemWriter(spec, tiny_template(spec, tokenizer), units),
        spec,
        settings or DatasetSettings(),
    )


def _spans(corpus: Corpus) -> dict[int, tuple[int, int]]:
    return {i: (FRAMES * i, FRAMES) for i in range(len(corpus.utterances))}


def _some(batches: TinyBatches, corpus: Corpus) -> list[Batch]:
    spans = _spans(corpus)
    heard = [batches.heard(step, spans) for step in range(NUM_STEPS)]
    return heard + [batches.typed(step) for step in range(NUM_STEPS)]


def _writer(
    tokenizer: Tokenizer, units: UnitVoice, alignment: TextAlignment = "word"
) -> ItemWriter:
    spec = _spec(tokenizer, alignment)
    return ItemWriter(spec, tiny_template(spec, tokenizer), units)


def test_every_word_is_one_token_with_and_without_a_space(tokenizer: Tokenizer) -> None:
    for word in vocabulary():
        assert len(encode(tokenizer, word)) == len(encode(tokenizer, f" {word}")) == 1
    assert decode(tokenizer, encode(tokenizer, "Grüß Gott!")) == "Grüß Gott!"


def test_no_held_out_utterance_is_in_a_batch(
    corpus: Corpus, units: UnitVoice, tokenizer: Tokenizer
) -> None:
    heard = set()
    for batch in _some(_batches(corpus, units, tokenizer), corpus):
        heard |= set((batch.frames[batch.frames != NO_FRAME] // FRAMES).tolist())
    assert len(heard) > 100
    assert {corpus.utterances[i].split for i in heard} == {Split.TRAIN}


def test_an_utterance_has_no_gaps_and_some_silence_is_cut(
    corpus: Corpus, units: UnitVoice, tokenizer: Tokenizer
) -> None:
    lengths = set()
    for step in range(7):  # the eighth is a dialogue
        for frames in _batches(corpus, units, tokenizer).heard(step, _spans(corpus)).frames:
            heard = frames[frames != NO_FRAME]
            assert (heard.diff() == 1).all()
            lengths.add(len(heard))
    assert min(lengths) >= FRAMES - 75
    assert max(lengths) <= FRAMES
    assert len(lengths) > 20


def test_no_held_out_question_or_answer_is_in_a_batch(
    corpus: Corpus, units: UnitVoice, tokenizer: Tokenizer
) -> None:
    held_out = {q.text for q in questions() if q.is_held_out}
    never, num_answers = answers_never_trained(), 0
    for batch in _some(_batches(corpus, units, tokenizer), corpus):
        for column in batch.rows[..., -1].tolist():
            text = decode(tokenizer, column)
            for turn in text.split("User: ")[1:]:
                asked, _, answered = turn.partition("\n\nAssistant: ")
                answered = answered.partition("\n\n")[0].strip()
                num_answers += 1
                assert asked not in held_out
                assert answered not in never
    assert num_answers > 500


def test_random_sentences_would_contain_held_out_answers_without_the_filter(
    corpus: Corpus, units: UnitVoice, tokenizer: Tokenizer
) -> None:
    """Shows that the tests above can fail: the filter removes held-out answers from 20,000
    sentences."""
    batches, draw = _batches(corpus, units, tokenizer), random.Random(0)
    said = {batches.random_sentence(draw) for _ in range(20_000)}
    assert len(said & set(answers())) > 100
    assert not said & answers_never_trained()


@pytest.mark.parametrize(("share", "learns_text"), [(0.0, True), (1.0, False)])
def test_a_sentence_for_its_sound_alone_trains_no_text(
    share: float, learns_text: bool, corpus: Corpus, units: UnitVoice, tokenizer: Tokenizer
) -> None:
    settings = DatasetSettings(num_typed=8, speech_only_share=share)
    batches = _batches(corpus, units, tokenizer, settings)
    text = batches.typed(3).targets[..., -1] != IGNORE
    assert text.any(dim=1).tolist() == [learns_text] * 8


@pytest.mark.parametrize(("share", "learns_text"), [(0.0, True), (1.0, False)])
def test_a_heard_question_answered_with_another_sentence_trains_no_text(
    share: float, learns_text: bool, corpus: Corpus, units: UnitVoice, tokenizer: Tokenizer
) -> None:
    settings = DatasetSettings(num_heard=8, aloud_every=4, swapped_share=share)
    batches = _batches(corpus, units, tokenizer, settings)
    text = batches.heard(3, _spans(corpus)).targets[..., -1] != IGNORE
    assert text.any(dim=1).tolist() == [learns_text, True, True, True] * 2


def test_targets_are_the_next_row_at_every_labelled_position(
    corpus: Corpus, units: UnitVoice, tokenizer: Tokenizer
) -> None:
    """Text exactly; codes except those that are corrupted in the rows, which targets never are."""
    spec, same = _spec(tokenizer).vocabulary, []
    for batch in _some(_batches(corpus, units, tokenizer), corpus):
        asked = batch.targets[:, :-1] != IGNORE
        text = asked[..., -1]
        assert (batch.rows[:, 1:, -1][text] == batch.targets[:, :-1, -1][text]).all()
        for i in range(spec.num_codebooks):
            local = batch.rows[:, 1:, i][asked[..., i]] - spec.codebook_base(i)
            same.append((local == batch.targets[:, :-1, i][asked[..., i]]).float().mean())
    assert 0.85 < float(np.nanmean(same)) < 0.99


def test_a_spoken_item_gives_its_codes_back_to_the_runtime(
    units: UnitVoice, tokenizer: Tokenizer
) -> None:
    writer, vocab = _writer(tokenizer, units), _spec(tokenizer).vocabulary
    answer = "gate four opens at nine"
    prompt = writer.prompt([], Typed(text="when does gate four open"))
    item = writer.spoken(prompt, answer, np.zeros(0, np.int64))
    rows = AnswerRows(vocab)
    frames, bases = [], np.array([vocab.codebook_base(i) for i in range(7)])
    for row in item.rows[len(prompt.rows) :]:
        fed, frame = rows.push(int(row[-1]), row[:-1] - bases)
        np.testing.assert_array_equal(fed, row)
        if frame is not None:
            frames.append(frame)
    np.testing.assert_array_equal(np.array(frames), units.answer_codes(answer)[0])
    assert rows.is_done


def test_the_speaker_is_in_the_last_prompt_row_of_spoken_items_only(
    units: UnitVoice, tokenizer: Tokenizer
) -> None:
    writer, vocab = _writer(tokenizer, units), _spec(tokenizer).vocabulary
    prompt = writer.prompt([], Typed(text="hello"))
    last = len(prompt.rows) - 1
    spoken = writer.spoken(prompt, "you are welcome", np.zeros(0, np.int64))
    written = writer.written(prompt, "you are welcome", np.zeros(0, np.int64))
    assert (spoken.rows[last, 0], written.rows[last, 0]) == (
        vocab.codebook_base(0) + vocab.speaker("ANS_A"),
        vocab.codebook_base(0) + vocab.pad_audio,
    )
    assert (written.targets[:, :-1] == IGNORE).all()


def test_speech_only_items_have_no_text_targets_and_no_target_for_the_first_code(
    units: UnitVoice, tokenizer: Tokenizer
) -> None:
    writer = _writer(tokenizer, units)
    prompt = writer.prompt([], Typed(text="hello"))
    last = len(prompt.rows) - 1
    item = writer.spoken(prompt, "gate two", np.zeros(0, np.int64), train_text=False)
    assert (item.targets[:, -1] == IGNORE).all()
    # The row of BOS, last + 1, is the first from which a code is asked; it has no word yet.
    assert item.targets[last + 1, 0] == IGNORE
    assert item.targets[last + 2, 0] != IGNORE


def test_each_word_is_in_the_row_in_which_its_sound_begins(
    units: UnitVoice, tokenizer: Tokenizer
) -> None:
    """Two frames a word: sound begins in frames 0, 2 and 4; row 0 is BOS, so the first word
    waits."""
    vocab = _spec(tokenizer).vocabulary
    calling, room, one = encode(tokenizer, "calling room one")
    pad = vocab.pad_text
    ids = _writer(tokenizer, units).text_ids("calling room one")
    assert ids == [vocab.bos, calling, room, pad, one, pad, pad, vocab.eos]


def test_text_that_runs_ahead_has_no_padding(units: UnitVoice, tokenizer: Tokenizer) -> None:
    ids = _writer(tokenizer, units, "ahead").text_ids("calling room one")
    assert len(ids) == 5
    assert _spec(tokenizer).vocabulary.pad_text not in ids


def test_an_earlier_answer_is_in_the_text_only_and_ends_with_eos(
    units: UnitVoice, tokenizer: Tokenizer
) -> None:
    """Exactly the rows that remain in the second item of batch-parallel decoding."""
    writer, vocab = _writer(tokenizer, units), _spec(tokenizer).vocabulary
    first = writer.prompt([], Typed(text="hello"))
    prompt = writer.prompt([(Typed(text="hello"), "you are welcome")], Typed(text="help"))
    ids = writer.text_ids("you are welcome")
    history = prompt.rows[len(first.rows) : len(first.rows) + len(ids)]
    assert history[:, -1].tolist() == ids
    assert (history[:, 0] == vocab.codebook_base(0) + vocab.pad_audio).all()
    assert prompt.rows[len(first.rows) + len(ids), -1] == vocab.bos


def test_a_step_has_the_same_items_in_every_draw(
    corpus: Corpus, units: UnitVoice, tokenizer: Tokenizer
) -> None:
    one, other = (_batches(corpus, units, tokenizer) for _ in range(2))
    one.typed(0)
    assert (one.typed(5).rows == other.typed(5).rows).all()
    assert (
        one.typed(5).rows.shape != one.typed(6).rows.shape
        or (one.typed(5).rows != one.typed(6).rows).any()
    )


def test_two_halves_make_up_the_whole_step(
    corpus: Corpus, units: UnitVoice, tokenizer: Tokenizer
) -> None:
    batches = _batches(corpus, units, tokenizer)
    for step in range(8):  # one of them is a dialogue, of half as many items
        for batch in (batches.heard(step, _spans(corpus)), batches.typed(step)):
            first, last = batch.halves()
            assert len(first.rows) == len(last.rows) > 0
            for name in ("rows", "targets", "frames"):
                parts = torch.cat([getattr(first, name), getattr(last, name)])
                assert torch.equal(parts, getattr(batch, name))


def test_batches_have_few_lengths_and_their_padding_has_no_targets(
    corpus: Corpus, units: UnitVoice, tokenizer: Tokenizer
) -> None:
    pad_text = _spec(tokenizer).vocabulary.pad_text
    for batch in _some(_batches(corpus, units, tokenizer), corpus):
        length = batch.rows.shape[1]
        asked = (batch.targets != IGNORE).any(dim=2)
        last = int(asked.any(dim=0).nonzero().max())
        assert length % LENGTH_STEP == 0
        assert length - last <= LENGTH_STEP + 1
        assert (batch.rows[:, last + 2 :, -1] == pad_text).all()


def test_a_step_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="num_heard = 2"):
        DatasetSettings(num_heard=2)
