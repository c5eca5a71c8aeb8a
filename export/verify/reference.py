"""DeepTalk in numpy, by its definition: what exported graphs are held against where torch is not.

Nothing is absorbed or cached: keys and values are expanded, a conversation is computed as a
whole, every weight is read from the checkpoint when its turn comes and dropped. Float32.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2; Whisper (arXiv 2212.04356), section 2.2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.checkpoint.reader import EMBEDDING, HEAD, Checkpoint, expected_tensors
from deeptalk_edge.export.graphs.builder import Array
from deeptalk_edge.export.graphs.layers import Dense, rounded
from deeptalk_edge.export.packed.experts import ExpertSource

Floats = NDArray[np.float32]

_NORM_EPS = 1e-5  # of Whisper's norms
_EXACT = (".gate", ".kv_b_proj")  # of the decoder's layers: never quantised


class Reference:
    """One checkpoint; T rows, N tokens. Slow and plain."""

    def __init__(
        self, checkpoint: Checkpoint, experts: ExpertSource | None = None, dense: Dense = "float"
    ) -> None:
        """Routed experts and dense weights are rounded as a bundle holds them, or not at all."""
        self._checkpoint = checkpoint
        self._held = experts
        self._dense = dense
        self.spec = checkpoint.spec
        self._names = expected_tensors(checkpoint.spec)

    def encode(self, log_mel: Floats) -> Floats:
        """Log-mel (M, 2F) of the whole window, or of its beginning, to features (F, C)."""
        name = "model.audio_encoder"
        waves = _gelu(self._convolve(log_mel, f"{name}.conv1", stride=1))
        waves = _gelu(self._convolve(waves, f"{name}.conv2", stride=2))
        frames = waves.T + self._tensor(f"{name}.embed_positions.weight")[: waves.shape[1]]
        for i in range(self.spec.encoder.num_layers):
            layer = f"{name}.layers.{i}"
            frames = frames + self._hear(self._layer_norm(frames, f"{layer}.self_attn"), layer)
            normed = self._layer_norm(frames, f"{layer}.final")
            widened = _gelu(self._linear(normed, f"{layer}.fc1"))
            frames = frames + self._linear(widened, f"{layer}.fc2")
        frames = self._layer_norm(frames, name)
        projector = "model.audio_mm_projector"
        one, two = (self._linear(frames, f"{projector}.fc_{i}") for i in (1, 2))
        return self._linear(silu(one) * two, f"{projector}.proj")

    def embed(self, rows: Array, features: Floats, audio_mask: Array) -> Floats:
        """Rows (T, K + 1) and features (T, C) where `audio_mask` (T) is set to (T, C)."""
        table = self._tensor(EMBEDDING)
        codec, text = table[rows[:, :-1]].sum(axis=1), table[rows[:, -1]]
        num_codebooks = rows.shape[1] - 1
        codec = np.where(audio_mask[:, None], num_codebooks * features, codec)
        return np.asarray((codec + text) / (num_codebooks + 1), np.float32)

    def decode(self, x: Floats) -> Floats:
        """All rows of a conversation, (T, C), to hidden states (T, C)."""
        spec = self.spec.decoder
        for i in range(spec.num_layers):
            name = f"model.layers.{i}"
            x = x + self._attend(self._rms_norm(x, f"{name}.input_layernorm"), f"{name}.self_attn")
            normed = self._rms_norm(x, f"{name}.post_attention_layernorm")
            if i in spec.moe_layers:
                if spec.num_shared_experts:
                    x = x + self._swiglu(normed, f"{name}.mlp.shared_experts")
                x = x + self._experts(normed, f"{name}.mlp")
            else:
                x = x + self._swiglu(normed, f"{name}.mlp")
        return self._rms_norm(x, "model.norm")

    def logits(self, hidden: Floats) -> tuple[Floats, Floats]:
        """Hidden states (N, C) to text logits (N, V_text) and code logits (N, K, V_code)."""
        vocabulary = self.spec.vocabulary
        table = self._tensor(EMBEDDING if self.spec.tied_head else HEAD)
        text, codes = np.split(hidden @ table.T, [vocabulary.text_size], axis=1)
        return text, codes.reshape(-1, vocabulary.num_codebooks, vocabulary.codebook_block)

    def _attend(self, x: Floats, name: str) -> Floats:
        """Latent attention (T, C), every row over itself and those before it."""
        spec, num_rows = self.spec.decoder, len(x)
        # The scale first, as in the graphs: it decides how the weight is rounded.
        scaled = self._tensor(f"{name}.q_proj.weight") * np.float32(spec.softmax_scale)
        query = (x @ rounded(scaled, self._dense).T).reshape(num_rows, spec.num_heads, -1)
        nope, rope = np.split(query, [spec.nope_dim], axis=2)
        latent, key_rope = np.split(
            self._linear(x, f"{name}.kv_a_proj_with_mqa"), [spec.latent_dim], axis=1
        )
        latent = self._rms_norm(latent, f"{name}.kv_a_layernorm")
        both = self._linear(latent, f"{name}.kv_b_proj").reshape(num_rows, spec.num_heads, -1)
        key, value = np.split(both, [spec.nope_dim], axis=2)
        scores = np.einsum("thn,shn->hts", nope, key)
        scores += np.einsum("thd,sd->hts", self._turn(rope), self._turn(key_rope[:, None])[:, 0])
        seen = np.tri(num_rows, dtype=np.bool_)
        shares = _softmax(np.where(seen, scores, -np.inf))
        heads = np.einsum("hts,shv->thv", shares, value)
        return self._linear(heads.reshape(num_rows, -1), f"{name}.o_proj")

    def _turn(self, pairs: Floats) -> Floats:
        """Turn (T, n, D), a pair side by side, by the rows' positions; leaves its halves apart."""
        spec = self.spec.decoder
        frequencies = np.array(spec.rope_frequencies(), np.float32)
        angles = np.arange(len(pairs), dtype=np.float32)[:, None, None] * frequencies
        cos, sin = (of(angles) * np.float32(spec.rope_amplitude) for of in (np.cos, np.sin))
        left, right = pairs[..., ::2], pairs[..., 1::2]
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    def _experts(self, tokens: Floats, name: str) -> Floats:
        """The weighted sum (N, C) of the experts that each token is routed to."""
        spec = self.spec.decoder
        shares = _softmax(self._linear(tokens, f"{name}.gate"))
        chosen = np.argsort(-shares, axis=1, kind="stable")[:, : spec.top_k]
        weights = np.zeros_like(shares)
        np.put_along_axis(weights, chosen, np.take_along_axis(shares, chosen, axis=1), axis=1)
        if spec.normalise_top_k and spec.top_k > 1:
            weights /= weights.sum(axis=1, keepdims=True)
        else:
            weights *= np.float32(spec.routed_scale)
        routed = np.zeros_like(tokens)
        for expert in np.unique(chosen).tolist():
            users = np.flatnonzero(weights[:, expert])
            gate_up, down = self._expert(f"{name}.experts.{expert}")
            gate, up = np.split(tokens[users] @ gate_up.T, 2, axis=1)
            y = (silu(gate) * up) @ down.T
            routed[users] += weights[users, expert, None] * y
        return routed

    def _expert(self, name: str) -> tuple[Floats, Floats]:
        if self._held is not None:
            layer, expert = int(name.split(".")[2]), int(name.split(".")[-1])
            return self._held.form(layer).dequantise(self._held.weights(layer, expert))
        gate, up, down = (self._tensor(f"{name}.{p}_proj.weight") for p in ("gate", "up", "down"))
        return np.concatenate([gate, up]), down

    def _hear(self, frames: Floats, layer: str) -> Floats:
        """The encoder's attention, every frame over all."""
        heads, name = self.spec.encoder.num_heads, f"{layer}.self_attn"
        query, key, value = (
            self._linear(frames, f"{name}.{p}_proj").reshape(len(frames), heads, -1) for p in "qkv"
        )
        scale = np.float32(query.shape[2] ** -0.5)
        # Head by head: full-size Whisper's scores would be 144 MB at once.
        mixed = [_softmax(query[:, h] @ key[:, h].T * scale) @ value[:, h] for h in range(heads)]
        return self._linear(np.concatenate(mixed, axis=1), f"{name}.out_proj")

    def _swiglu(self, x: Floats, name: str) -> Floats:
        gate, up = (self._linear(x, f"{name}.{part}_proj") for part in ("gate", "up"))
        return self._linear(silu(gate) * up, f"{name}.down_proj")

    def _linear(self, x: Floats, name: str) -> Floats:
        weight = self._tensor(f"{name}.weight")
        if name.startswith("model.layers.") and not name.endswith(_EXACT):
            weight = rounded(weight, self._dense)
        product = x @ weight.T
        bias = f"{name}.bias"
        return product + self._tensor(bias) if bias in self._names else product

    def _convolve(self, waves: Floats, name: str, *, stride: int) -> Floats:
        """Kernel 3, padding 1: (C_in, N) to (C_out, N / stride)."""
        padded, weight = np.pad(waves, ((0, 0), (1, 1))), self._tensor(f"{name}.weight")
        size = waves.shape[1]
        taps = [weight[:, :, k] @ padded[:, k : k + size : stride] for k in range(3)]
        return np.asarray(sum(taps) + self._tensor(f"{name}.bias")[:, None])

    def _rms_norm(self, x: Floats, name: str) -> Floats:
        square = np.square(x).mean(axis=-1, keepdims=True)
        root = np.sqrt(square + np.float32(self.spec.decoder.eps_of(name)))
        return np.asarray(x / root * self._tensor(f"{name}.weight"))

    def _layer_norm(self, x: Floats, name: str) -> Floats:
        centred = x - x.mean(axis=-1, keepdims=True)
        deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(_NORM_EPS))
        # Whisper calls its last norm `layer_norm`, the others `<part>_layer_norm`.
        norm = f"{name}.layer_norm" if name.endswith("encoder") else f"{name}_layer_norm"
        normed = centred / deviation * self._tensor(f"{norm}.weight")
        return np.asarray(normed + self._tensor(f"{norm}.bias"))

    def _tensor(self, name: str) -> Floats:
        return self._checkpoint.tensor(name)


def _softmax(scores: Floats) -> Floats:
    """Over the last axis."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def silu(x: Floats) -> Floats:
    """x sigmoid(x)."""
    return np.asarray(x / (1 + np.exp(-x)))


def _gelu(x: Floats) -> Floats:
    """x times the normal distribution, to 2e-7. Source: Abramowitz and Stegun, 7.1.26."""
    distance = np.abs(x) / np.sqrt(np.float32(2))
    t = 1 / (1 + np.float32(0.3275911) * distance)
    powers = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
    tail = sum(np.float32(a) * t ** (i + 1) for i, a in enumerate(powers)) * np.exp(-(distance**2))
    return np.asarray(x * np.where(x >= 0, 1 - tail / 2, tail / 2), np.float32)
