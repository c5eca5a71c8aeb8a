"""DeepTalk in float64 numpy, equation by equation: slow, literal, without shared code.

One sequence, no batch, no cache; a loop for every sum that the papers write over rows and heads.

Source: arXiv 2405.04434 (MLA: equations 9 to 19, MoE: 20 to 23); arXiv 2309.00071 (YaRN: 20 to 24);
arXiv 2212.04356 (encoder); arXiv 2506.21864 (rows and heads).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.spec import DecoderSpec, ModelSpec

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Weights = Mapping[str, NDArray[np.float64]]


def encode(spec: ModelSpec, weights: Weights, log_mel: Matrix) -> Matrix:
    """Log-mel (M, 2F) to features (F, C)."""
    w = _under(weights, "model.audio_encoder.")
    x = [gelu(v) for v in convolve(w["conv1.weight"], w["conv1.bias"], list(log_mel.T), stride=1)]
    x = [gelu(v) for v in convolve(w["conv2.weight"], w["conv2.bias"], x, stride=2)]
    x = [v + w["embed_positions.weight"][t] for t, v in enumerate(x)]
    for i in range(spec.encoder.num_layers):
        layer = _under(w, f"layers.{i}.")
        normed = [layer_norm(layer, "self_attn_layer_norm", v) for v in x]
        heard = encoder_attention(_under(layer, "self_attn."), normed, spec.encoder.num_heads)
        x = [v + a for v, a in zip(x, heard, strict=True)]
        for t, v in enumerate(x):
            inner = gelu(affine(layer, "fc1", layer_norm(layer, "final_layer_norm", v)))
            x[t] = v + affine(layer, "fc2", inner)
    p = _under(weights, "model.audio_mm_projector.")
    frames = [layer_norm(w, "layer_norm", v) for v in x]
    return np.array(
        [p["proj.weight"] @ (silu(p["fc_1.weight"] @ v) * (p["fc_2.weight"] @ v)) for v in frames]
    )


def convolve(kernel: Matrix, bias: Vector, x: list[Vector], *, stride: int) -> list[Vector]:
    """Three taps, one zero row on either side."""
    padded = [np.zeros_like(x[0]), *x, np.zeros_like(x[0])]
    return [
        bias + sum(kernel[:, :, tap] @ padded[t + tap] for tap in range(3))
        for t in range(0, len(x), stride)
    ]


def encoder_attention(w: Weights, x: list[Vector], num_heads: int) -> list[Vector]:
    queries = [affine(w, "q_proj", v) for v in x]
    keys = [w["k_proj.weight"] @ v for v in x]
    values = [affine(w, "v_proj", v) for v in x]
    d = len(queries[0]) // num_heads
    out = []
    for q in queries:
        heads = []
        for h in range(num_heads):
            part = slice(h * d, (h + 1) * d)
            shares = softmax(np.array([q[part] @ k[part] / math.sqrt(d) for k in keys]))
            heads.append(sum(s * v[part] for s, v in zip(shares, values, strict=True)))
        out.append(affine(w, "out_proj", np.concatenate(heads)))
    return out


def embed(
    spec: ModelSpec,
    weights: Weights,
    rows: NDArray[np.int64],
    features: Matrix,
    audio_mask: NDArray[np.bool_],
) -> list[Vector]:
    """Rows (T, K + 1) to mean embeddings; `features` (T, C) where the mask (T,) is set."""
    table = weights["model.embed_tokens.weight"]
    k = spec.vocabulary.num_codebooks
    mixed = []
    for row, feature, heard in zip(rows, features, audio_mask, strict=True):
        codec = [feature if heard else table[row[i]] for i in range(k)]
        mixed.append(sum([*codec, table[row[k]]]) / (k + 1))
    return mixed


def decode(spec: ModelSpec, weights: Weights, x: list[Vector]) -> Matrix:
    """Row embeddings to hidden states (T, C) after the final norm."""
    d = spec.decoder
    for i in range(d.num_layers):
        w = _under(weights, f"model.layers.{i}.")
        normed = [rms_norm(w["input_layernorm.weight"], v, d.norm_eps) for v in x]
        heads = latent_attention(d, _under(w, "self_attn."), normed)
        x = [v + a for v, a in zip(x, heads, strict=True)]
        mlp = _under(w, "mlp.")
        for t, v in enumerate(x):
            h = rms_norm(w["post_attention_layernorm.weight"], v, d.norm_eps)
            x[t] = v + (swiglu(mlp, h) if i < d.num_dense_layers else mixture(d, mlp, h))
    return np.array([rms_norm(weights["model.norm.weight"], v, d.norm_eps) for v in x])


def text_logits(spec: ModelSpec, weights: Weights, hidden: Matrix) -> Matrix:
    """(T, C) to (T, V_text)."""
    table = weights[_head(spec)]
    return np.array([[table[i] @ h for i in range(spec.vocabulary.text_size)] for h in hidden])


def code_logits(spec: ModelSpec, weights: Weights, hidden: Matrix) -> NDArray[np.float64]:
    """(T, C) to (T, K, V_code)."""
    table, v = weights[_head(spec)], spec.vocabulary
    logits = np.zeros((len(hidden), v.num_codebooks, v.codebook_block))
    for t, h in enumerate(hidden):
        for i in range(v.num_codebooks):
            for code in range(v.codebook_block):
                logits[t, i, code] = table[v.text_size + i * v.codebook_block + code] @ h
    return logits


def _head(spec: ModelSpec) -> str:
    return "model.embed_tokens.weight" if spec.tied_head else "lm_head.weight"


def latent_attention(d: DecoderSpec, w: Weights, x: list[Vector]) -> list[Vector]:
    latents, rope_keys, out = [], [], []
    for t, v in enumerate(x):
        both = w["kv_a_proj_with_mqa.weight"] @ v
        latents.append(rms_norm(w["kv_a_layernorm.weight"], both[: d.latent_dim], 1e-6))
        rope_keys.append(turn(d, both[d.latent_dim :], t))
    for t, v in enumerate(x):
        query = w["q_proj.weight"] @ v
        heads = []
        for h in range(d.num_heads):
            q = query[h * (d.nope_dim + d.rope_dim) : (h + 1) * (d.nope_dim + d.rope_dim)]
            q_nope, q_rope = q[: d.nope_dim], turn(d, q[d.nope_dim :], t)
            up = w["kv_b_proj.weight"][
                h * (d.nope_dim + d.value_dim) : (h + 1) * (d.nope_dim + d.value_dim)
            ]
            scores, values = [], []
            for s in range(t + 1):
                key = up[: d.nope_dim] @ latents[s]
                values.append(up[d.nope_dim :] @ latents[s])
                scores.append(softmax_scale(d) * (q_nope @ key + q_rope @ rope_keys[s]))
            shares = softmax(np.array(scores))
            heads.append(sum(a * value for a, value in zip(shares, values, strict=True)))
        out.append(w["o_proj.weight"] @ np.concatenate(heads))
    return out


def turn(d: DecoderSpec, v: Vector, position: int) -> Vector:
    """Rotate the pairs (v0, v1), (v2, v3), ...; first components come first in the result."""
    half = d.rope_dim // 2
    out = np.zeros(d.rope_dim)
    for j in range(half):
        angle = position * frequency(d, j)
        out[j] = v[2 * j] * math.cos(angle) - v[2 * j + 1] * math.sin(angle)
        out[half + j] = v[2 * j + 1] * math.cos(angle) + v[2 * j] * math.sin(angle)
    if d.yarn is not None:
        y = d.yarn
        out *= magnitude(y.factor, y.mscale) / magnitude(y.factor, y.mscale_all_dim)
    return out


def frequency(d: DecoderSpec, j: int) -> float:
    """YaRN: frequencies with many periods in the trained length stay, those with few are
    lowered."""
    plain = math.pow(d.rope_theta, -2 * j / d.rope_dim)
    y = d.yarn
    if y is None:
        return plain

    def index_of(turns: float) -> float:
        wave = y.original_positions / turns
        return d.rope_dim / 2 * math.log(wave / (2 * math.pi)) / math.log(d.rope_theta)

    low = max(math.floor(index_of(y.beta_fast)), 0)
    high = min(math.ceil(index_of(y.beta_slow)), d.rope_dim - 1)
    slow = min(1.0, max(0.0, (j - low) / (high - low)))
    return (1 - slow) * plain + slow * plain / y.factor


def softmax_scale(d: DecoderSpec) -> float:
    scale = 1 / math.sqrt(d.nope_dim + d.rope_dim)
    if d.yarn is not None:
        scale *= magnitude(d.yarn.factor, d.yarn.mscale_all_dim) ** 2
    return scale


def magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1


def mixture(d: DecoderSpec, w: Weights, h: Vector) -> Vector:
    shares = softmax(w["gate.weight"] @ h)
    chosen = sorted(range(d.num_experts), key=lambda e: -shares[e])[: d.top_k]
    total = sum(shares[e] for e in chosen)
    factor = 1 / total if d.normalise_top_k and d.top_k > 1 else d.routed_scale
    out = np.zeros_like(h)
    if d.num_shared_experts:
        out = swiglu(_under(w, "shared_experts."), h)
    for e in chosen:
        out = out + factor * shares[e] * swiglu(_under(w, f"experts.{e}."), h)
    return out


def swiglu(w: Weights, h: Vector) -> Vector:
    return w["down_proj.weight"] @ (silu(w["gate_proj.weight"] @ h) * (w["up_proj.weight"] @ h))


def affine(w: Weights, name: str, v: Vector) -> Vector:
    return w[f"{name}.weight"] @ v + w[f"{name}.bias"]


def rms_norm(scale: Vector, v: Vector, eps: float) -> Vector:
    return scale * v / math.sqrt(sum(c * c for c in v) / len(v) + eps)


def layer_norm(w: Weights, name: str, v: Vector) -> Vector:
    centred = v - sum(v) / len(v)
    spread = math.sqrt(sum(c * c for c in centred) / len(v) + 1e-5)
    return w[f"{name}.weight"] * centred / spread + w[f"{name}.bias"]


def softmax(z: Vector) -> Vector:
    powers = [math.exp(c - max(z)) for c in z]
    return np.array(powers) / math.fsum(powers)


def silu(v: Vector) -> Vector:
    return np.array([c / (1 + math.exp(-c)) for c in v])


def gelu(v: Vector) -> Vector:
    return np.array([c * 0.5 * (1 + math.erf(c / math.sqrt(2))) for c in v])


def _under(weights: Weights, prefix: str) -> Weights:
    return {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
