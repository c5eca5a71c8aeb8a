"""A Whisper-shaped encoder, and the projector from its frames to the decoder's width.

Log-mel of the whole window in, one frame per two mel frames out; every frame attends to all others,
so nothing can be encoded before the utterance is over. Parameters are named as in the checkpoint.

Source: arXiv 2212.04356 (Whisper), section 2.2; LUCY `multimodal_projector: LinearProjector`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deeptalk_edge.model.spec import EncoderSpec
from deeptalk_edge.training.attention import dot_product_attention


class AudioEncoder(nn.Module):
    """Two convolutions, the second of stride 2, fixed sinusoidal positions, pre-norm layers."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self._spec = spec
        self.conv1 = nn.Conv1d(spec.num_mel_bins, spec.width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(spec.width, spec.width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(spec.max_frames, spec.width)
        self.layers = nn.ModuleList(EncoderLayer(spec) for _ in range(spec.num_layers))
        self.layer_norm = nn.LayerNorm(spec.width)
        with torch.no_grad():
            self.embed_positions.weight.copy_(sinusoids(spec.max_frames, spec.width))

    def forward(self, log_mel: Tensor) -> Tensor:
        """Log-mel (B, M, 2F) of the whole window to frames (B, F, W), F being `max_frames`.

        Raises ValueError if the window has another size.
        """
        bins, mel_frames = self._spec.num_mel_bins, 2 * self._spec.max_frames
        if log_mel.shape[1:] != (bins, mel_frames):
            raise ValueError(
                f"log_mel is {tuple(log_mel.shape)}, expected (B, {bins}, {mel_frames}): "
                "pad it to the whole window"
            )
        waves = F.gelu(self.conv1(log_mel))
        frames = F.gelu(self.conv2(waves)).transpose(1, 2)
        hidden: Tensor = frames + self.embed_positions.weight
        for layer in self.layers:
            hidden = layer(hidden)
        normed: Tensor = self.layer_norm(hidden)
        return normed


class EncoderLayer(nn.Module):
    """Self-attention, then a GELU MLP; the norm comes before each."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.self_attn = EncoderAttention(spec)
        self.self_attn_layer_norm = nn.LayerNorm(spec.width)
        self.fc1 = nn.Linear(spec.width, spec.ffn_width)
        self.fc2 = nn.Linear(spec.ffn_width, spec.width)
        self.final_layer_norm = nn.LayerNorm(spec.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, F, W) to (B, F, W)."""
        hidden = hidden + self.self_attn(self.self_attn_layer_norm(hidden))
        widened = F.gelu(self.fc1(self.final_layer_norm(hidden)))
        out: Tensor = hidden + self.fc2(widened)
        return out


class EncoderAttention(nn.Module):
    """Full attention; the key projection has no bias."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self._num_heads = spec.num_heads
        self.q_proj = nn.Linear(spec.width, spec.width)
        self.k_proj = nn.Linear(spec.width, spec.width, bias=False)
        self.v_proj = nn.Linear(spec.width, spec.width)
        self.out_proj = nn.Linear(spec.width, spec.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, F, W) to (B, F, W)."""
        query, key, value = (
            proj(hidden).unflatten(-1, (self._num_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scale = query.shape[-1] ** -0.5
        heads = dot_product_attention(query, key, value, scale, is_causal=False)
        out: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return out


class Projector(nn.Module):
    """Encoder width to decoder width: proj(silu(fc_1 x) * fc_2 x), without bias."""

    def __init__(self, encoder_width: int, projector_width: int, decoder_width: int) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(encoder_width, projector_width, bias=False)
        self.fc_2 = nn.Linear(encoder_width, projector_width, bias=False)
        self.proj = nn.Linear(projector_width, decoder_width, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """(B, F, W) to (B, F, C)."""
        out: Tensor = self.proj(F.silu(self.fc_1(frames)) * self.fc_2(frames))
        return out


def sinusoids(num_positions: int, width: int) -> Tensor:
    """Whisper's fixed positions (num_positions, width): sines, then cosines."""
    half = width // 2
    rates = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
    angles = torch.arange(num_positions)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
