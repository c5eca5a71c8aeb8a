"""The codec's first half: which codes a sound gets. Trained on log-mel frames alone.

SNAC's own encoder is never needed on a device, so a small mel encoder replaces it: fitting the
quantiser to log-mel frames costs a minute, where a waveform auto-encoder would cost days.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.files import write_file
from deeptalk_edge.model.spec import CodecSpec
from deeptalk_edge.progress import progress
from deeptalk_edge.training.snac import ResidualQuantizer, rows_from_scales
from deeptalk_edge.training.tiny.codebooks import CodeUsage, start_codebooks
from deeptalk_edge.training.tiny.corpus import Clips
from deeptalk_edge.training.tiny.mel import NUM_MELS, LogMel

TINY_CODEC = CodecSpec(
    sampling_rate=24000,
    encoder_dim=12,
    encoder_rates=(2, 4, 8, 8),
    latent_dim=192,
    decoder_dim=256,
    decoder_rates=(8, 8, 4, 2),
    codebook_size=512,
    codebook_dim=8,
    vq_strides=(4, 2, 1),
    noise=True,
    depthwise=True,
)


REVIVE_AFTER = 60
"""Steps with codebooks before the count of their use means anything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSettings:
    """How to fit the mel encoder and the quantiser."""

    num_steps: int = 700
    batch_clips: int = 12
    clip_frames: int = 64
    learning_rate: float = 2e-3
    unquantised_share: float = 0.2
    """Share of the steps before the codebooks come in; k-means then starts them."""

    revive_every: int = 30
    """Steps between moving codes that nothing uses to where the data is."""

    revive_until: float = 0.8
    """Share of the steps after which the codes are left where they are."""

    seed: int = 0

    @property
    def quantise_from(self) -> int:
        return int(self.num_steps * self.unquantised_share)

    @property
    def revival_steps(self) -> range:
        first = self.quantise_from + REVIVE_AFTER
        first += -first % self.revive_every
        return range(first, int(self.num_steps * self.revive_until), self.revive_every)


class MelBlock(nn.Module):
    """A depthwise convolution over time, then a two-layer perceptron on each frame, added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(channels, channels, 5, padding=2, groups=channels)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(channels),
            nn.Linear(channels, 2 * channels),
            nn.GELU(),
            nn.Linear(2 * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.perceptron(self.mix(x).transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class Tokeniser(nn.Module):
    """Sound to codes, for training targets only: log-mel, a mel encoder, SNAC's quantiser."""

    def __init__(self, spec: CodecSpec = TINY_CODEC, width: int = 128) -> None:
        super().__init__()
        self.spec = spec
        self.log_mel = LogMel(spec)
        self.encoder = nn.Sequential(
            nn.Conv1d(NUM_MELS, width, 5, padding=2),
            *(MelBlock(width) for _ in range(3)),
            nn.Conv1d(width, spec.latent_dim, 3, padding=1),
        )
        self.quantizer = ResidualQuantizer(spec)

    @torch.inference_mode()
    def codes(self, samples: npt.NDArray[np.float32]) -> Tensor:
        """(N,) samples to (T, 7) codes; the end is padded with silence to a whole frame."""
        device = next(self.parameters()).device
        waveform = torch.from_numpy(samples).to(device)[None]
        waveform = functional.pad(waveform, (0, -len(samples) % self.spec.frame_samples))
        scales = self.quantizer(self.encoder(self.log_mel(waveform))).scales
        return rows_from_scales(scales, self.spec)[0].cpu()

    def save(self, path: Path) -> None:
        """Write the weights, whole or not at all."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_file(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> Tokeniser:
        """Read what `save` wrote.

        Raises ArtifactError if it is missing or of another shape.
        """
        tokeniser = cls()
        try:
            tokeniser.load_state_dict(load_file(path))
        except (OSError, RuntimeError) as error:
            raise ArtifactError(f"{path}: not this tokeniser ({error}); train it again") from error
        return tokeniser.eval()


def train_tokens(
    speech: Clips, settings: TokenSettings, *, device: str = "cpu"
) -> tuple[Tokeniser, float]:
    """Fit mel encoder and quantiser to the answer voice.

    Returns the tokeniser and its mean absolute log-mel error on the clips held out, one in forty.
    """
    torch.manual_seed(settings.seed)
    tokeniser = Tokeniser().to(device)
    spec = tokeniser.spec
    mel_decoder = nn.Sequential(
        MelBlock(spec.latent_dim),
        MelBlock(spec.latent_dim),
        nn.Conv1d(spec.latent_dim, NUM_MELS, 3, padding=1),
    ).to(device)
    mels = _mels_of(speech, tokeniser, device)
    held_out = mels[::40]
    frames = torch.cat([mel for i, mel in enumerate(mels) if i % 40], dim=1)
    parameters = [*tokeniser.parameters(), *mel_decoder.parameters()]
    optimiser = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, settings.num_steps, pct_start=0.1
    )
    usage = CodeUsage(tokeniser.quantizer)
    bar = progress(range(settings.num_steps), name="tokens", unit="step")
    for step in bar:
        if step == settings.quantise_from:
            start = _random_clips(frames, 300, settings.clip_frames)
            start_codebooks(tokeniser.quantizer, tokeniser.encoder(start))
        mel = _random_clips(frames, settings.batch_clips, settings.clip_frames)
        latent = tokeniser.encoder(mel)
        codebook_loss = latent.new_zeros(())
        if step >= settings.quantise_from:
            quantised = tokeniser.quantizer(latent)
            latent, codebook_loss = quantised.latent, quantised.loss
            usage.count(quantised.scales)
            if step in settings.revival_steps:
                usage.revive(quantised.projections)
        mel_error = (mel_decoder(latent) - mel).abs().mean()
        optimiser.zero_grad()
        (mel_error + codebook_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(mel=f"{mel_error.item():.3f}", refresh=False)
    tokeniser.eval()
    with torch.inference_mode():
        errors = [
            (mel_decoder(tokeniser.quantizer(tokeniser.encoder(mel[None])).latent)[0] - mel).abs()
            for mel in held_out
        ]
    return tokeniser, torch.cat([error.flatten() for error in errors]).mean().item()


@torch.inference_mode()
def _mels_of(speech: Clips, tokeniser: Tokeniser, device: str) -> list[Tensor]:
    mels = []
    for index in range(len(speech)):
        samples = torch.from_numpy(speech[index]).to(device)
        padded = functional.pad(samples, (0, -len(samples) % tokeniser.spec.frame_samples))
        mels.append(tokeniser.log_mel(padded[None])[0].clone())
    return mels


def _random_clips(frames: Tensor, num_clips: int, clip_frames: int) -> Tensor:
    """(B, M, clip_frames) cut at random places out of (M, F)."""
    starts = torch.randint(frames.shape[1] - clip_frames, (num_clips,))
    return torch.stack([frames[:, start : start + clip_frames] for start in starts.tolist()])
