"""SNAC at 24 kHz in torch: waveform to codes of three rates, and back.

codes      a row of seven per 2048-sample frame: [c12 | c24 c24 | c48 c48 c48 c48], in time order
names      equal the published package's, weight normalisation included, so its checkpoints load
noise      off, or given: one tensor for each decoder block (noise_tape.py makes them repeatable)
losses     the quantiser returns its commitment and codebook loss, which the package leaves out

Source: hubertsiuzdak/snac, arXiv 2410.14411. Attention is not built: the 24 kHz model has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import CodecSpec

COMMITMENT_WEIGHT = 0.25
DILATIONS = (1, 3, 9)


class Quantised(NamedTuple):
    """What the quantiser makes of a latent."""

    latent: Tensor
    """(B, C, F), straight through: its gradient reaches the encoder."""

    scales: list[Tensor]
    """Codes, one (B, F / stride) tensor for each scale, slowest first."""

    loss: Tensor
    projections: list[Tensor]
    """What each codebook had to match, (B, D, F / stride); k-means starts from these."""


class Snake(nn.Module):
    """x + sin(ax)^2 / a, with one `a` for each channel. Source: arXiv 2006.08195."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sin(self.alpha * x).square() / (self.alpha + 1e-9)


class ResidualUnit(nn.Module):
    """A dilated convolution and a pointwise one, added to their input."""

    def __init__(self, channels: int, dilation: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            Snake(channels),
            _conv(channels, channels, 7, dilation=dilation, padding=3 * dilation, groups=groups),
            Snake(channels),
            _conv(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    """Three residual units, then `stride` times fewer samples in twice as many channels."""

    def __init__(self, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *(ResidualUnit(channels, dilation, groups) for dilation in DILATIONS),
            Snake(channels),
            _conv(channels, 2 * channels, 2 * stride, stride=stride, padding=(stride + 1) // 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """(B, 1, N) samples to a (B, C, N / hop) latent."""

    def __init__(self, spec: CodecSpec) -> None:
        super().__init__()
        channels = spec.encoder_dim
        layers: list[nn.Module] = [_conv(1, channels, 7, padding=3)]
        for stride in spec.encoder_rates:
            layers.append(EncoderBlock(channels, stride, channels if spec.depthwise else 1))
            channels *= 2
        layers.append(
            _conv(channels, channels, 7, padding=3, groups=channels if spec.depthwise else 1)
        )
        self.block = nn.Sequential(*layers)

    def forward(self, samples: Tensor) -> Tensor:
        return self.block(samples)  # type: ignore[no-any-return]


class NoiseBlock(nn.Module):
    """Adds noise as loud as a projection of the signal says; all channels share one noise."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = _conv(channels, channels, 1, bias=False)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return x + noise * self.linear(x)  # type: ignore[no-any-return]


class DecoderBlock(nn.Module):
    """`stride` times more samples in half as many channels, then three residual units."""

    def __init__(self, channels: int, stride: int, spec: CodecSpec) -> None:
        super().__init__()
        halved = channels // 2
        upsample = nn.ConvTranspose1d(
            channels,
            halved,
            2 * stride,
            stride=stride,
            padding=(stride + 1) // 2,
            output_padding=stride % 2,
        )
        groups = halved if spec.depthwise else 1
        self.block = nn.Sequential(
            Snake(channels),
            weight_norm(upsample),
            *([NoiseBlock(halved)] if spec.noise else []),
            *(ResidualUnit(halved, dilation, groups) for dilation in DILATIONS),
        )

    def forward(self, x: Tensor, noise: Tensor | None) -> Tensor:
        for layer in self.block:
            if not isinstance(layer, NoiseBlock):
                x = layer(x)
            elif noise is not None:
                x = layer(x, noise)
        return x


class Decoder(nn.Module):
    """A (B, C, F) latent to (B, 1, F * hop) samples in -1..1."""

    def __init__(self, spec: CodecSpec) -> None:
        super().__init__()
        latent, channels = spec.latent_dim, spec.decoder_dim
        layers: list[nn.Module] = (
            [_conv(latent, latent, 7, padding=3, groups=latent), _conv(latent, channels, 1)]
            if spec.depthwise
            else [_conv(latent, channels, 7, padding=3)]
        )
        for stride in spec.decoder_rates:
            layers.append(DecoderBlock(channels, stride, spec))
            channels //= 2
        layers += [Snake(channels), _conv(channels, 1, 7, padding=3), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, latent: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """`noise`: per block a (B or 1, 1, samples at the block's rate) tensor; None is off."""
        x, block = latent, 0
        for layer in self.model:
            if isinstance(layer, DecoderBlock):
                x = layer(x, None if noise is None else noise[block])
                block += 1
            else:
                x = layer(x)
        return x


class VectorQuantizer(nn.Module):
    """One scale: the nearest codebook row by cosine, in a space of few dimensions."""

    def __init__(self, spec: CodecSpec, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.in_proj = _conv(spec.latent_dim, spec.codebook_dim, 1)
        self.out_proj = _conv(spec.codebook_dim, spec.latent_dim, 1)
        self.codebook = nn.Embedding(spec.codebook_size, spec.codebook_dim)

    def project(self, latent: Tensor) -> Tensor:
        """(B, C, F) to what the codebook has to match, (B, D, F / stride)."""
        return self.in_proj(functional.avg_pool1d(latent, self.stride))  # type: ignore[no-any-return]

    def nearest(self, projection: Tensor) -> Tensor:
        """Codes (B, F) of a (B, D, F) projection."""
        rows = functional.normalize(projection, dim=1).transpose(1, 2)
        return (rows @ functional.normalize(self.codebook.weight).T).argmax(-1)

    def rows(self, codes: Tensor) -> Tensor:
        """The codebook's rows for (B, F) codes, as (B, D, F)."""
        return self.codebook(codes).transpose(1, 2)  # type: ignore[no-any-return]

    def expand(self, rows: Tensor) -> Tensor:
        """Codebook rows back to the latent's channels and rate."""
        return self.out_proj(rows).repeat_interleave(self.stride, -1)  # type: ignore[no-any-return]


class ResidualQuantizer(nn.Module):
    """Each scale quantises what the slower ones left over."""

    def __init__(self, spec: CodecSpec) -> None:
        super().__init__()
        self.quantizers = nn.ModuleList(VectorQuantizer(spec, s) for s in spec.vq_strides)

    def forward(self, latent: Tensor) -> Quantised:
        """Quantise a (B, C, F) latent; F is a multiple of the slowest stride."""
        residual, total = latent, torch.zeros_like(latent)
        scales, projections, loss = [], [], latent.new_zeros(())
        for quantizer in self.quantizers:
            assert isinstance(quantizer, VectorQuantizer)
            projection = quantizer.project(residual)
            codes = quantizer.nearest(projection)
            rows = quantizer.rows(codes)
            loss = loss + COMMITMENT_WEIGHT * functional.mse_loss(projection, rows.detach())
            loss = loss + functional.mse_loss(rows, projection.detach())
            expanded = quantizer.expand(projection + (rows - projection).detach())
            residual, total = residual - expanded, total + expanded
            scales.append(codes)
            projections.append(projection)
        return Quantised(total, scales, loss, projections)

    def latent(self, scales: Sequence[Tensor]) -> Tensor:
        """The (B, C, F) latent of the codes."""
        parts = []
        for quantizer, codes in zip(self.quantizers, scales, strict=True):
            assert isinstance(quantizer, VectorQuantizer)
            parts.append(quantizer.expand(quantizer.rows(codes)))
        return torch.stack(parts).sum(0)


class Snac(nn.Module):
    """The codec; without an encoder it only decodes."""

    def __init__(self, spec: CodecSpec, *, with_encoder: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec) if with_encoder else None
        self.quantizer = ResidualQuantizer(spec)
        self.decoder = Decoder(spec)

    def encode(self, samples: Tensor) -> Tensor:
        """(B, N) samples to (B, T, 7) codes; the end is padded with silence to a whole frame.

        Raises ArtifactError if this checkpoint came without an encoder.
        """
        if self.encoder is None:
            raise ArtifactError("this SNAC checkpoint holds no encoder.* tensors: it only decodes")
        padded = functional.pad(samples, (0, -samples.shape[-1] % self.spec.frame_samples))
        return rows_from_scales(self.quantizer(self.encoder(padded[:, None])).scales, self.spec)

    def decode(self, codes: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """(B, T, 7) codes to (B, T * 2048) samples."""
        latent = self.quantizer.latent(scales_from_rows(codes, self.spec))
        return self.decoder(latent, noise)[:, 0]  # type: ignore[no-any-return]


def scales_from_rows(rows: Tensor, spec: CodecSpec) -> list[Tensor]:
    """Split (B, T, 7) codes into one (B, T * codes per frame) tensor for each scale."""
    widths = [spec.vq_strides[0] // stride for stride in spec.vq_strides]
    return [scale.flatten(1) for scale in torch.split(rows, widths, dim=-1)]


def rows_from_scales(scales: Sequence[Tensor], spec: CodecSpec) -> Tensor:
    """The opposite of `scales_from_rows`."""
    widths = [spec.vq_strides[0] // stride for stride in spec.vq_strides]
    parts = [scale.reshape(len(scale), -1, w) for scale, w in zip(scales, widths, strict=True)]
    return torch.cat(parts, dim=-1)


def _conv(
    channels_in: int,
    channels_out: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = True,
) -> nn.Module:
    plain = nn.Conv1d(channels_in, channels_out, kernel, stride, padding, dilation, groups, bias)
    normalised: nn.Module = weight_norm(plain)
    return normalised
