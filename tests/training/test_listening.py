"""The hearing stage: its start, its course, and the layers that its two heads train."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deeptalk_edge.model.spec import EncoderSpec
from deeptalk_edge.training.encoder import EncoderLayer
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.tiny.corpus import Clips, Corpus, Utterance
from deeptalk_edge.training.tiny.dataset import UtterancePool
from deeptalk_edge.training.tiny.domain import Split
from deeptalk_edge.training.tiny.hearing import Ear, HearingSettings
from deeptalk_edge.training.tiny.listening import (
    WINDOW_STEP,
    HearingBatches,
    HearingPlan,
    Listener,
    encode_window,
    start_ear,
)
from deeptalk_edge.training.tiny.voices import ANSWER_VOICE
from tests.specs import PLAIN

ENCODER = EncoderSpec(
    num_mel_bins=80, width=48, num_layers=2, num_heads=4, ffn_width=32, max_frames=100
)
SPEC = replace(PLAIN, encoder=ENCODER)
PHONES = {"gate": ["g", "ey", "t"], "eight": ["ey", "t"], "exit": ["eh", "g", "z", "ih", "t"]}
PLAN = HearingPlan(num_steps=10, batch_size=3, phone_layer=1, whole_from=0.5)

ALL = slice(None)


def _batches(plan: HearingPlan = PLAN) -> HearingBatches:
    questions = ["gate eight", "exit", "eight eight"]
    rng = np.random.default_rng(0)
    pcm = rng.integers(-3000, 3000, 3 * 8000).astype(np.int16)
    clips = Clips(pcm, np.arange(4) * 8000, 16000)
    utterances = tuple(
        Utterance(
            question=question,
            answer="",
            intent="gate",
            key="",
            split=Split.TRAIN,
            is_test=False,
            voice=ANSWER_VOICE,
        )
        for question in questions
    )
    corpus = Corpus(
        seed=0,
        utterances=utterances,
        questions=clips,
        answer_texts=(),
        answers=clips,
        phones=PHONES,
    )
    ear = Ear((clips[i] for i in range(3)), ENCODER, HearingSettings(), "cpu")
    return HearingBatches(corpus, UtterancePool(corpus, ear.lengths), ear, SPEC, plan)


def _listener(batches: HearingBatches, plan: HearingPlan = PLAN) -> Listener:
    torch.manual_seed(0)
    return Listener(DeepTalk(SPEC), len(batches.words), len(batches.phones), plan)


def test_labels_are_the_words_and_the_phones_of_what_is_said() -> None:
    batches = _batches()
    batch = batches(0, ALL)
    for labels, alphabet in ((batch.words, batches.words), (batch.phones, batches.phones)):
        said = [alphabet[i - 1] for i in labels.ids.tolist()]
        lines = np.split(np.array(said), labels.counts.cumsum(0)[:-1])
        if alphabet is batches.words:
            words = [line.tolist() for line in lines]
        else:
            phones = [line.tolist() for line in lines]
    assert phones == [[p for word in line for p in PHONES[word]] for line in words]
    assert {" ".join(line) for line in words} <= {"gate eight", "exit", "eight eight"}


def test_windows_are_short_at_first_and_whole_later() -> None:
    batches = _batches()
    early, late = batches(4, ALL), batches(5, ALL)
    assert early.log_mel.shape[2] < late.log_mel.shape[2] == 2 * ENCODER.max_frames


def test_short_windows_come_in_few_lengths_and_hold_every_utterance() -> None:
    batches = _batches()
    for step in range(5):
        batch = batches(step, ALL)
        mel_frames = batch.log_mel.shape[2]
        assert mel_frames % WINDOW_STEP == 0 or mel_frames == 2 * ENCODER.max_frames
        assert 2 * int(batch.num_frames.max()) <= mel_frames


def test_two_processes_share_whole_windows_without_gaps_or_repeats() -> None:
    batches = _batches()
    assert len(batches.parts(4)) == 1
    parts = [batches(*part) for part in batches.parts(5)]
    assert len(parts) == 2
    assert sum(part.share for part in parts) == pytest.approx(1)
    together = torch.cat([part.words.ids for part in parts]).sort().values
    assert torch.equal(together, batches(5, ALL).words.ids.sort().values)


def test_a_part_of_a_batch_counts_by_its_share() -> None:
    batches = _batches()
    listener, batch = _listener(batches), batches(0, ALL)
    whole = listener.losses(batch, bfloat16=False)
    third = listener.losses(replace(batch, share=1 / 3), bfloat16=False)
    for name, loss in whole.items():
        assert third[name].item() == pytest.approx(loss.item() / 3)


def test_a_step_always_draws_the_same_batch() -> None:
    first, again, other = _batches()(3, ALL), _batches()(3, ALL), _batches()(4, ALL)
    assert torch.equal(first.log_mel, again.log_mel)
    assert torch.equal(first.words.ids, again.words.ids)
    assert first.log_mel.shape != other.log_mel.shape


def test_phones_train_only_the_layers_below_their_head() -> None:
    batches = _batches()
    listener = _listener(batches)
    loss = listener.losses(batches(0, ALL), bfloat16=False)["phones"]
    layers = listener.deeptalk.model.audio_encoder.layers
    under, above = (layer.get_parameter("fc1.weight") for layer in layers)
    pull = torch.autograd.grad(loss, [under, above], allow_unused=True)
    assert pull[0] is not None
    assert pull[1] is None


def test_words_also_train_the_projector() -> None:
    batches = _batches()
    listener = _listener(batches)
    losses = listener.losses(batches(0, ALL), bfloat16=False)
    projector = listener.deeptalk.model.audio_mm_projector
    pull = torch.autograd.grad(losses["words"], list(projector.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in pull)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_the_phones_have_the_weight_of_the_plan() -> None:
    batches = _batches()
    batch = batches(0, ALL)
    half, whole = (
        _listener(batches, replace(PLAN, phone_weight=weight)).losses(batch, bfloat16=False)
        for weight in (0.5, 1.0)
    )
    torch.testing.assert_close(2 * half["phones"], whole["phones"])
    torch.testing.assert_close(half["words"], whole["words"])


def test_a_whole_window_is_encoded_as_by_the_model() -> None:
    model, mel = DeepTalk(SPEC), torch.randn(2, 80, 2 * ENCODER.max_frames)
    start_ear(model)
    torch.testing.assert_close(encode_window(model, mel, 1)[1], model.encode(mel))


def test_a_new_encoder_attends_at_fixed_offsets() -> None:
    """On positions alone, every head of the first layer attends most to its own offset."""
    torch.manual_seed(0)
    model = DeepTalk(SPEC)
    start_ear(model)
    encoder = model.model.audio_encoder
    layer = encoder.layers[0]
    assert isinstance(layer, EncoderLayer)
    attention = layer.self_attn
    positions = torch.nn.functional.layer_norm(encoder.embed_positions.weight, (ENCODER.width,))
    query, key = (
        proj.weight.detach() @ positions.detach().T for proj in (attention.q_proj, attention.k_proj)
    )
    query, key = (x.view(ENCODER.num_heads, -1, x.shape[1]) for x in (query, key))
    best = torch.einsum("hdt,hds->hts", query, key).argmax(dim=-1)
    middle = torch.arange(30, 70)
    offsets = [(best[h, middle] - middle).float().median().item() for h in range(4)]
    assert offsets == pytest.approx([-6, -2, 2, 6], abs=1)


def test_clear_speech_comes_before_hard_speech() -> None:
    plan = HearingPlan(num_steps=100, easy_until=0.2, hard_from=0.6)
    strengths = [plan.strength_at(step) for step in (0, 20, 40, 60, 99)]
    middle = (plan.easy_strength + plan.hard_strength) / 2
    assert strengths == pytest.approx([0.2, 0.2, middle, plan.hard_strength, plan.hard_strength])
