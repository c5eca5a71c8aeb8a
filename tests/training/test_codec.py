"""Training the tiny codec: codes stay in use, the decoder learns, frozen parts do not change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from deeptalk_edge.training.snac import ResidualQuantizer
from deeptalk_edge.training.tiny.codebooks import CodeUsage, start_codebooks
from deeptalk_edge.training.tiny.codec import (
    HOLD_OUT_EVERY,
    DecoderSettings,
    SpectralLoss,
    decode_segments,
    train_decoder,
    training_tape,
)
from deeptalk_edge.training.tiny.corpus import Clips
from deeptalk_edge.training.tiny.tokens import (
    TINY_CODEC,
    Tokeniser,
    TokenSettings,
    train_tokens,
)
from deeptalk_edge.training.tiny.units import UnitVoice

FRAME = TINY_CODEC.frame_samples
SHORT = DecoderSettings(num_steps=12, batch_segments=2, segment_frames=2, num_unit_strings=0)


@pytest.fixture(scope="module")
def speech() -> Clips:
    """45 clips of gliding tones, each four frames and a bit long."""
    rng = np.random.default_rng(0)
    time = np.arange(4 * FRAME + 100) / TINY_CODEC.sampling_rate
    clips = [
        np.sin(2 * np.pi * (rng.uniform(100, 3000) + rng.uniform(-500, 500) * time) * time)
        for _ in range(45)
    ]
    pcm = np.asarray(np.concatenate(clips) * 12000, np.int16)
    return Clips(pcm, np.arange(46, dtype=np.int64) * len(time), TINY_CODEC.sampling_rate)


@pytest.fixture(scope="module")
def tokeniser() -> Tokeniser:
    torch.manual_seed(0)
    return Tokeniser().eval()


@pytest.fixture
def quantizer() -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer(TINY_CODEC)


def _clustered_latent(num_clusters: int) -> Tensor:
    """(4, C, 256): at any time one of a few directions, and a little noise."""
    centres = torch.randn(num_clusters, TINY_CODEC.latent_dim)
    latent = centres[torch.randint(num_clusters, (4, 256))]
    return (latent + 0.02 * torch.randn_like(latent)).transpose(1, 2)


@torch.no_grad()
def test_started_codebooks_reconstruct_better_than_random_ones(
    quantizer: ResidualQuantizer,
) -> None:
    latent = _clustered_latent(20)
    before = quantizer(latent).loss
    start_codebooks(quantizer, latent)
    assert quantizer(latent).loss < 0.2 * before


@torch.no_grad()
def test_a_code_that_nothing_uses_is_moved_to_where_the_data_is(
    quantizer: ResidualQuantizer,
) -> None:
    latent, usage = torch.randn(4, TINY_CODEC.latent_dim, 256), CodeUsage(quantizer)
    in_use = len(quantizer(latent).scales[2].unique())
    for _ in range(50):
        usage.count(quantizer(latent).scales)
    usage.revive(quantizer(latent).projections)
    assert len(quantizer(latent).scales[2].unique()) > in_use + 40


@torch.no_grad()
def test_a_code_in_use_is_not_moved(quantizer: ResidualQuantizer) -> None:
    usage = CodeUsage(quantizer)
    every_code = [torch.arange(TINY_CODEC.codebook_size)[None] for _ in TINY_CODEC.vq_strides]
    for _ in range(50):
        usage.count(every_code)
    before = [parameter.clone() for parameter in quantizer.parameters()]
    usage.revive(quantizer(_clustered_latent(20)).projections)
    assert all(torch.equal(a, b) for a, b in zip(before, quantizer.parameters(), strict=True))


@pytest.mark.slow
def test_training_tokens_lowers_the_mel_error_and_follows_the_seed(speech: Clips) -> None:
    settings = TokenSettings(num_steps=8, clip_frames=16)
    first, short_error = train_tokens(speech, settings)
    again, _ = train_tokens(speech, settings)
    _, long_error = train_tokens(speech, replace(settings, num_steps=60))
    assert long_error < 0.8 * short_error
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_tape_leaves_out_held_out_sentences(speech: Clips, tokeniser: Tokeniser) -> None:
    tape = training_tape(speech, tokeniser, UnitVoice({}), SHORT, "cpu")
    num_kept = len(speech) - len(range(0, len(speech), HOLD_OUT_EVERY))
    assert len(tape.codes) == num_kept * 5
    assert len(tape.samples) == len(tape.codes) * FRAME
    assert torch.equal(tape.samples[: len(speech[1])], torch.from_numpy(speech[1]))


def test_segments_keep_codes_and_samples_together(speech: Clips, tokeniser: Tokeniser) -> None:
    tape = training_tape(speech, tokeniser, UnitVoice({}), SHORT, "cpu")
    tape.samples.copy_(torch.arange(len(tape.codes)).repeat_interleave(FRAME))
    tape.codes.copy_(torch.arange(len(tape.codes))[:, None].expand(-1, 7))
    segments = tape.random_segments(4, 3, TINY_CODEC)
    assert torch.equal(segments.samples.view(4, 3, FRAME)[..., 0], segments.codes[..., 0].float())


@pytest.mark.slow
def test_training_the_decoder_lowers_its_loss_and_leaves_the_codes_alone(
    speech: Clips, tokeniser: Tokeniser
) -> None:
    tape = training_tape(speech, tokeniser, UnitVoice({}), SHORT, "cpu")
    untrained, _ = train_decoder(
        speech, tokeniser, UnitVoice({}), replace(SHORT, num_steps=1, learning_rate=0.0)
    )
    trained, _ = train_decoder(speech, tokeniser, UnitVoice({}), SHORT)
    torch.manual_seed(1)
    with torch.no_grad():
        losses = [
            SpectralLoss(TINY_CODEC)(*decode_segments(codec, tape, SHORT))[0]
            for codec in (untrained, trained)
        ]
    assert losses[1] < 0.8 * losses[0]
    for name, tensor in tokeniser.quantizer.state_dict().items():
        assert torch.equal(trained.quantizer.state_dict()[name], tensor), name


def test_the_spectral_loss_is_0_for_equal_sounds_and_finite_for_silence() -> None:
    loss = SpectralLoss(TINY_CODEC)
    sound = torch.randn(1, 4 * FRAME) / 10
    assert all(value < 1e-6 for value in loss(sound, sound))
    silence = torch.zeros(1, 4 * FRAME, requires_grad=True)
    loss(silence, sound)[0].backward()
    assert silence.grad is not None
    assert torch.isfinite(silence.grad).all()
