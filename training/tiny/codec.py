"""Trains the tiny SNAC: codes first, then a decoder that turns them back into the answer voice.

tokens    mel encoder and quantiser (tokens.py), then frozen
units     the answer voice's prompts, encoded with them (units.py)
decoder   SNAC's decoder as a vocoder: several STFT resolutions and a log-mel, no adversary

What a device hears are unit codes end to end, so the decoder practises on such strings as well as
on whole sentences: only the strings have the joins in them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from deeptalk_edge.model.spec import CodecSpec
from deeptalk_edge.progress import progress
from deeptalk_edge.training.snac import Snac, scales_from_rows
from deeptalk_edge.training.tiny.corpus import Clips, Samples, as_samples
from deeptalk_edge.training.tiny.domain import random_answer
from deeptalk_edge.training.tiny.mel import mel_filters
from deeptalk_edge.training.tiny.tokens import Tokeniser
from deeptalk_edge.training.tiny.units import UnitVoice

HOLD_OUT_EVERY = 40
"""One sentence in so many is never shown to tokens or decoder; scores are taken on these."""

STFT_SIZES = ((2048, 480, 1920), (1024, 240, 960), (512, 120, 480))
"""(transform, hop, window) of each resolution of the loss, in samples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSettings:
    """How to fit the decoder."""

    num_steps: int = 2800
    """On one core 0.45 s each; a recogniser understands the result from 600 on."""

    batch_segments: int = 3
    segment_frames: int = 9
    """Codec frames of a segment that the loss sees."""

    context_frames: int = 1
    """Codec frames more on both sides, decoded and cut."""

    learning_rate: float = 1.5e-3
    final_rate: float = 0.05
    """Share of `learning_rate` at which the cosine ends."""

    num_unit_strings: int = 1000
    """Random answers of unit codes, shown beside the 1,600 whole sentences."""

    seed: int = 0


@dataclass(frozen=True, slots=True)
class Tape:
    """Codes and their samples, all clips end to end."""

    codes: Tensor
    """(T, 7)."""

    samples: Tensor
    """(T * frame_samples,)."""

    def random_segments(self, num_segments: int, num_frames: int, spec: CodecSpec) -> Tape:
        """(B, num_frames, 7) codes and their (B, num_frames * frame_samples) samples."""
        starts = torch.randint(len(self.codes) - num_frames, (num_segments,)).tolist()
        width = spec.frame_samples
        return Tape(
            torch.stack([self.codes[s : s + num_frames] for s in starts]),
            torch.stack([self.samples[s * width : (s + num_frames) * width] for s in starts]),
        )


class SpectralLoss(nn.Module):
    """How far two sounds are apart: magnitudes at three resolutions, and a log-mel."""

    mel: Tensor

    def __init__(self, spec: CodecSpec) -> None:
        super().__init__()
        self.register_buffer("mel", mel_filters(spec.sampling_rate, 2048, 80, 9000))

    def forward(self, found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of (B, N) samples, and the mean absolute log-mel error that is part of it."""
        both = torch.cat([found, wanted])
        loss = both.new_zeros(())
        for size, hop, window in STFT_SIZES:
            a, b = _magnitudes(both, size, hop, window).chunk(2)
            loss = loss + 0.5 * torch.linalg.norm(b - a) / torch.linalg.norm(b)
            loss = loss + (torch.log(a + 2e-2) - torch.log(b + 2e-2)).abs().mean()
        mel = torch.log(self.mel @ _magnitudes(both, 2048, 256, 1024) + 1e-3)
        a, b = mel.chunk(2)
        mel_error = (a - b).abs().mean()
        return loss / len(STFT_SIZES) + 2 * mel_error, mel_error


def train_decoder(
    speech: Clips,
    tokeniser: Tokeniser,
    units: UnitVoice,
    settings: DecoderSettings,
    *,
    device: str = "cpu",
) -> tuple[Snac, float]:
    """Fit SNAC's decoder to the frozen codes.

    Returns the codec, without an encoder, and its log-mel error on the sentences held out.
    """
    torch.manual_seed(settings.seed)
    codec = Snac(tokeniser.spec, with_encoder=False).to(device)
    codec.quantizer.load_state_dict(tokeniser.quantizer.state_dict())
    codec.quantizer.requires_grad_(False)
    spectral_loss = SpectralLoss(codec.spec).to(device)
    tape = training_tape(speech, tokeniser.to(device), units, settings, device)
    optimiser = torch.optim.AdamW(
        codec.decoder.parameters(), settings.learning_rate, betas=(0.8, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, settings.num_steps, settings.learning_rate * settings.final_rate
    )
    bar = progress(range(settings.num_steps), name="decoder", unit="step")
    for step in bar:
        found, wanted = decode_segments(codec, tape, settings)
        loss, mel_error = spectral_loss(found, wanted)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.decoder.parameters(), 2.0)
        optimiser.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", mel=f"{mel_error.item():.3f}", refresh=False)
    codec.eval()
    return codec, _held_out_mel_error(codec, speech, tokeniser, spectral_loss)


def decode_segments(codec: Snac, tape: Tape, settings: DecoderSettings) -> tuple[Tensor, Tensor]:
    """Decode random segments with fresh noise: (B, N) samples, and the recording of the same."""
    spec, context = codec.spec, settings.context_frames
    num_frames = settings.segment_frames + 2 * context
    segments = tape.random_segments(settings.batch_segments, num_frames, spec)
    with torch.no_grad():
        latent = codec.quantizer.latent(scales_from_rows(segments.codes, spec))
    noise = list(_fresh_noise(spec, len(latent), num_frames, latent.device))
    margin = context * spec.frame_samples
    samples = codec.decoder(latent, noise)[:, 0]
    return samples[:, margin:-margin], segments.samples[:, margin:-margin]


def _fresh_noise(
    spec: CodecSpec, num_segments: int, num_frames: int, device: torch.device
) -> Iterator[Tensor]:
    width = num_frames * spec.vq_strides[0]
    for stride in spec.decoder_rates:
        width *= stride
        yield torch.randn(num_segments, 1, width, device=device)


def training_tape(
    speech: Clips, tokeniser: Tokeniser, units: UnitVoice, settings: DecoderSettings, device: str
) -> Tape:
    """Every sentence that is not held out, then strings of units."""
    codes: list[Tensor] = []
    samples: list[Samples] = []
    for index in range(len(speech)):
        if index % HOLD_OUT_EVERY:
            codes.append(tokeniser.codes(speech[index]))
            missing = -len(speech[index]) % tokeniser.spec.frame_samples
            samples.append(np.pad(speech[index], (0, missing)))
    rng = random.Random(settings.seed)
    for _ in range(settings.num_unit_strings):
        text = random_answer(rng)
        codes.append(torch.from_numpy(units.answer_codes(text)[0]))
        samples.append(as_samples(units.answer_pcm(text)))
    return Tape(torch.cat(codes).to(device), torch.from_numpy(np.concatenate(samples)).to(device))


@torch.inference_mode()
def _held_out_mel_error(
    codec: Snac, speech: Clips, tokeniser: Tokeniser, spectral_loss: SpectralLoss
) -> float:
    errors = []
    for index in range(0, len(speech), HOLD_OUT_EVERY):
        wanted = torch.from_numpy(speech[index]).to(spectral_loss.mel.device)[None]
        codes = tokeniser.codes(speech[index])[None].to(wanted.device)
        found = codec.decode(codes)[:, : wanted.shape[1]]
        errors.append(spectral_loss(found, wanted)[1].item())
    return float(np.mean(errors))


def _magnitudes(samples: Tensor, size: int, hop: int, window: int) -> Tensor:
    """(B, N) samples to (B, size / 2 + 1, frames) magnitudes, whose gradient is finite at zero."""
    shape = torch.hann_window(window, device=samples.device)
    spectrum = torch.stft(samples, size, hop, window, shape, return_complex=True)
    return torch.sqrt(spectrum.real.square() + spectrum.imag.square() + 1e-7)
