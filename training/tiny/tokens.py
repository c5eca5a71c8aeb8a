"""The codec's first half: which codes a sound gets. Trained by mel reconstruction, without a waveform.

SNAC's own encoder is never needed on a device, so a small mel encoder stands in for it here: fitting the
quantiser to log-mel frames costs a minute, where a waveform auto-encoder would cost days.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.spec import CodecSpec
from deeptalk_edge.training.snac import ResidualQuantizer, VectorQuantizer, rows_from_scales
from deeptalk_edge.training.tiny.corpus import Clips

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

NUM_MELS = 100
MEL_TOP_HZ = 8000
WINDOW = 1024
FFT_SIZE = 2048


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


def mel_filters(rate_hz: int, fft_size: int, num_mels: int, top_hz: float) -> Tensor:
    """Triangular filters, (num_mels, fft_size / 2 + 1), each of unit sum."""
    top_mel = 2595 * math.log10(1 + top_hz / 700)
    edges = 700 * (10 ** (np.linspace(0, top_mel, num_mels + 2) / 2595) - 1)
    bins = np.linspace(0, rate_hz / 2, fft_size // 2 + 1)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    filters = np.maximum(filters, 0)
    return torch.tensor(filters / (filters.sum(1, keepdims=True) + 1e-8), dtype=torch.float32)


class LogMel(nn.Module):
    """(B, N) samples to (B, M, N / hop); frame f is centred on sample hop * (f + 1/2)."""

    def __init__(self, spec: CodecSpec) -> None:
        super().__init__()
        self.hop = spec.hop_samples
        filters = mel_filters(spec.sampling_rate, FFT_SIZE, NUM_MELS, MEL_TOP_HZ)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        padded = functional.pad(samples, [(FFT_SIZE - self.hop) // 2] * 2)
        spectrum = torch.stft(
            padded, FFT_SIZE, self.hop, WINDOW, self.window, center=False, return_complex=True
        )
        return torch.log(self.filters @ spectrum.abs() + 1e-3)


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
        """Write the weights under a temporary name, then rename."""
        partial = path.with_name(path.name + ".partial")
        save_file({name: t.cpu().contiguous() for name, t in self.state_dict().items()}, partial)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Tokeniser":
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
    progress = tqdm(range(settings.num_steps), desc="tokens", unit="step", mininterval=2)
    for step in progress:
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
            if usage.steps > 60 and step % settings.revive_every == 0:
                if step < settings.num_steps * settings.revive_until:
                    usage.revive(quantised.projections)
        mel_error = (mel_decoder(latent) - mel).abs().mean()
        optimiser.zero_grad()
        (mel_error + codebook_loss).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(mel=f"{mel_error.item():.3f}")
    tokeniser.eval()
    with torch.inference_mode():
        errors = [
            (mel_decoder(tokeniser.quantizer(tokeniser.encoder(mel[None])).latent)[0] - mel).abs()
            for mel in held_out
        ]
    return tokeniser, torch.cat([error.flatten() for error in errors]).mean().item()


class CodeUsage:
    """How often each code is used, as a running mean; one per training."""

    def __init__(self, quantizer: ResidualQuantizer) -> None:
        self._quantizers = list(_levels(quantizer))
        self._means = [torch.zeros(q.codebook.num_embeddings) for q in self._quantizers]
        self.steps = 0

    def count(self, scales: list[Tensor]) -> None:
        """Take one batch's codes."""
        self.steps += 1
        for mean, codes in zip(self._means, scales, strict=True):
            counts = Counter(codes.flatten().tolist())
            mean *= 0.98
            for code, times in counts.items():
                mean[code] += 0.02 * times

    @torch.no_grad()
    def revive(self, projections: list[Tensor]) -> None:
        """Move each code that is hardly used onto a random projection of this batch."""
        for quantizer, mean, projection in zip(
            self._quantizers, self._means, projections, strict=True
        ):
            dead = (mean < 0.02 / quantizer.stride).to(projection.device)
            rows = projection.transpose(1, 2).flatten(0, 1)
            chosen = torch.randint(len(rows), (int(dead.sum()),), device=rows.device)
            quantizer.codebook.weight[dead] = rows[chosen]


@torch.no_grad()
def start_codebooks(quantizer: ResidualQuantizer, latent: Tensor) -> None:
    """Put each scale's codebook where the data is: k-means, slowest scale first.

    A faster scale sees what the slower ones leave over, so each starts after the one before it.
    """
    for level, vector_quantizer in enumerate(_levels(quantizer)):
        projection = quantizer(latent).projections[level]
        rows = projection.transpose(1, 2).flatten(0, 1)
        centres = _spherical_kmeans(rows, vector_quantizer.codebook.num_embeddings)
        vector_quantizer.codebook.weight.copy_(centres * rows.norm(dim=1).mean())


def _spherical_kmeans(rows: Tensor, num_centres: int, num_rounds: int = 20) -> Tensor:
    """Unit centres (num_centres, D) of (R, D) rows by cosine; an empty one restarts at a row."""
    rows = functional.normalize(rows)
    centres = rows[torch.randperm(len(rows), device=rows.device)[:num_centres]].clone()
    for _ in range(num_rounds):
        nearest = (rows @ centres.T).argmax(1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, rows)
        empty = torch.bincount(nearest, minlength=num_centres) == 0
        chosen = torch.randint(len(rows), (int(empty.sum()),), device=rows.device)
        centres[empty] = rows[chosen]
        centres = functional.normalize(centres)
    return centres


def _levels(quantizer: ResidualQuantizer) -> Iterator[VectorQuantizer]:
    for level in quantizer.quantizers:
        assert isinstance(level, VectorQuantizer)
        yield level


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
