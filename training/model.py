"""DeepTalk in torch: the reference that trains, and that every exported graph is held against.

The ids of a row become one mean embedding; the decoder is DeepSeek-V2's; text and codes are slices
of one head, which is the embedding if it is tied. Sizes and ids come from the ModelSpec; the state
dict has the official names.

Source: arXiv 2506.21864 (DeepTalk); arXiv 2405.04434 (DeepSeek-V2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deeptalk_edge.model.spec import DecoderSpec, ModelSpec
from deeptalk_edge.training.attention import Cache, LatentAttention, rotary_turns
from deeptalk_edge.training.encoder import AudioEncoder, Projector
from deeptalk_edge.training.experts import MixtureOfExperts, Router, Routing, SwiGlu

__all__ = ["Cache", "DeepTalk", "Routing", "align_features"]

INITIAL_STD = 0.02  # DeepSeek's `initializer_range`


class DeepTalk(nn.Module):
    """The whole model. In a batch, rows are padded on the right: causality is the only mask."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.checkpoints_gradients = False
        """Layers are computed again on the way back, instead of keeping their inner values."""
        self.model = Body(spec)
        self.lm_head = nn.Linear(spec.decoder.width, spec.vocabulary.size, bias=False)
        if spec.tied_head:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.apply(_initialise)

    def encode(self, log_mel: Tensor) -> Tensor:
        """Log-mel (B, M, 2F) of the whole window to audio features (B, F, C)."""
        features: Tensor = self.model.audio_mm_projector(self.model.audio_encoder(log_mel))
        return features

    def embed(
        self, rows: Tensor, features: Tensor | None = None, audio_mask: Tensor | None = None
    ) -> Tensor:
        """Rows (B, T, K + 1) to their mean embedding (B, T, C).

        Where `audio_mask` (B, T) is set, `features` (B, T, C) replace the embedding of each of
        the K codec columns; the text column's stays.
        """
        num_codebooks = self.spec.vocabulary.num_codebooks
        columns: Tensor = self.model.embed_tokens(rows)
        codec, text = columns[..., :-1, :].sum(dim=-2), columns[..., -1, :]
        if features is not None and audio_mask is not None:
            heard = (num_codebooks * features).to(codec.dtype)
            codec = torch.where(audio_mask[..., None], heard, codec)
        return (codec + text) / (num_codebooks + 1)

    def forward(
        self,
        rows: Tensor,
        features: Tensor | None = None,
        audio_mask: Tensor | None = None,
        *,
        cache: Cache | None = None,
        routing: list[Routing] | None = None,
    ) -> Tensor:
        """Rows (B, T, K + 1) to hidden states (B, T, C) after the final norm.

        `features` and `audio_mask` as in `embed`. With a `cache` the rows continue those that it
        holds, and it keeps them too. Every MoE layer appends to `routing`.
        """
        return self.decode(self.embed(rows, features, audio_mask), cache=cache, routing=routing)

    def decode(
        self, hidden: Tensor, *, cache: Cache | None = None, routing: list[Routing] | None = None
    ) -> Tensor:
        """Row embeddings (B, T, C) to hidden states (B, T, C) after the final norm."""
        start = cache.num_rows if cache is not None else 0
        turns = rotary_turns(self.spec.decoder, start, hidden.shape[1], hidden.device)
        for index, layer in enumerate(self.model.layers):
            if self.checkpoints_gradients and cache is None:
                hidden, *routed = checkpoint(layer, hidden, turns, None, use_reentrant=False)
            else:
                hidden, *routed = layer(hidden, turns, cache)
            if routing is not None and routed:
                probabilities, ids = routed
                routing.append(Routing(layer=index, probabilities=probabilities, expert_ids=ids))
        normed: Tensor = self.model.norm(hidden)
        return normed

    def text_logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V_text)."""
        return F.linear(hidden, self.lm_head.weight[: self.spec.vocabulary.text_size])

    def code_logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., K, V_code), un-shifted ids."""
        vocabulary = self.spec.vocabulary
        logits = F.linear(hidden, self.lm_head.weight[vocabulary.text_size :])
        return logits.view(*hidden.shape[:-1], vocabulary.num_codebooks, vocabulary.codebook_block)

    def set_barred_experts(self, expert_ids: Sequence[Sequence[int]] | None) -> None:
        """Keep all tokens away from some experts, a list per MoE layer; None bars none.

        Raises ValueError if the lists do not fit the model.
        """
        mixtures = [m for m in self.modules() if isinstance(m, MixtureOfExperts)]
        if expert_ids is None:
            expert_ids = [[]] * len(mixtures)
        if len(expert_ids) != len(mixtures):
            raise ValueError(f"{len(expert_ids)} lists of experts for {len(mixtures)} MoE layers")
        for mixture, barred in zip(mixtures, expert_ids, strict=True):
            mixture.gate.bar(barred)


class Body(nn.Module):
    """The tensors under `model.` in a checkpoint."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        decoder, encoder = spec.decoder, spec.encoder
        self.embed_tokens = nn.Embedding(spec.vocabulary.size, decoder.width)
        self.layers = nn.ModuleList(DecoderLayer(decoder, i) for i in range(decoder.num_layers))
        self.norm = nn.RMSNorm(decoder.width, eps=decoder.norm_eps)
        self.audio_encoder = AudioEncoder(encoder)
        self.audio_mm_projector = Projector(encoder.width, spec.projector_width, decoder.width)


class DecoderLayer(nn.Module):
    """Latent attention, then a dense MLP or experts; the norm comes before each."""

    def __init__(self, spec: DecoderSpec, index: int) -> None:
        super().__init__()
        self.index = index
        self.self_attn = LatentAttention(spec)
        self.mlp: nn.Module
        if index in spec.moe_layers:
            self.mlp = MixtureOfExperts(spec)
        else:
            self.mlp = SwiGlu(spec.width, spec.dense_ffn_width)
        self.input_layernorm = nn.RMSNorm(spec.width, eps=spec.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(spec.width, eps=spec.norm_eps)

    def forward(self, hidden: Tensor, turns: Tensor, cache: Cache | None) -> tuple[Tensor, ...]:
        """(B, T, C) to (B, T, C); of experts also the probabilities (B, T, E) and the ids
        (B, T, top_k). Plain tensors: what shards a model watches those alone."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), turns, self.index, cache)
        normed = self.post_attention_layernorm(hidden)
        if not isinstance(self.mlp, MixtureOfExperts):
            return (hidden + self.mlp(normed),)
        mixed, probabilities, ids = self.mlp(normed)
        return hidden + mixed, probabilities, ids


def align_features(features: Tensor, audio_mask: Tensor) -> Tensor:
    """Bring frames (B, F, C) to the rows (B, T, C) that hear them: masked row n takes frame n.

    Rows outside `audio_mask` (B, T) hold frame 0 or the last one before them, which is never read.
    """
    frame = (audio_mask.cumsum(dim=1) - 1).clamp(min=0)
    return features.gather(1, frame[..., None].expand(-1, -1, features.shape[-1]))


def _initialise(module: nn.Module) -> None:
    """Normal weights, as DeepSeek and Whisper begin; the encoder's positions stay sinusoids."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, Router):
        nn.init.normal_(module.weight, std=INITIAL_STD)
