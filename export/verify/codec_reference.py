"""SNAC's decoder in numpy, the whole utterance at once: what codec.onnx is held against.

Source: hubertsiuzdak/snac `layers.py`, `vq.py`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.checkpoint.codec import CodecWeights
from deeptalk_edge.export.graphs.builder import Array

Floats = NDArray[np.float32]


def decode_codes(weights: CodecWeights, codes: Array) -> Floats:
    """Frames of codes (A, K) to samples (N), without noise; values on the way are (C, N)."""
    spec, tensor = weights.spec, weights.tensor
    x = _latent(weights, codes)
    x = _convolve(weights, x, "decoder.model.0")
    first_block = 1
    if spec.depthwise:
        x = _convolve(weights, x, "decoder.model.1")
        first_block = 2
    for i, stride in enumerate(spec.decoder_rates):
        block = f"decoder.model.{first_block + i}.block"
        x = _upsample(weights, _snake(x, tensor(f"{block}.0.alpha")), f"{block}.1", stride)
        first_unit = 3 if spec.noise else 2
        for j, dilation in enumerate((1, 3, 9)):
            unit = f"{block}.{first_unit + j}.block"
            y = _snake(x, tensor(f"{unit}.0.alpha"))
            y = _convolve(weights, y, f"{unit}.1", dilation=dilation)
            y = _snake(y, tensor(f"{unit}.2.alpha"))
            x = x + _convolve(weights, y, f"{unit}.3")
    last = first_block + len(spec.decoder_rates)
    x = _snake(x, tensor(f"decoder.model.{last}.alpha"))
    return np.asarray(np.tanh(_convolve(weights, x, f"decoder.model.{last + 1}")[0]))


def _latent(weights: CodecWeights, codes: Array) -> Floats:
    """The sum over all scales."""
    spec = weights.spec
    widths = [spec.vq_strides[0] // stride for stride in spec.vq_strides]
    scales = np.split(codes, np.cumsum(widths)[:-1], axis=1)
    total = np.zeros((spec.latent_dim, len(codes) * spec.vq_strides[0]), np.float32)
    for i, (scale, stride) in enumerate(zip(scales, spec.vq_strides, strict=True)):
        name = f"quantizer.quantizers.{i}"
        found = weights.tensor(f"{name}.codebook.weight")[scale.ravel()].T
        total += np.repeat(_convolve(weights, found, f"{name}.out_proj"), stride, axis=1)
    return total


def _convolve(weights: CodecWeights, x: Floats, name: str, *, dilation: int = 1) -> Floats:
    """As many samples as before; depthwise where the weight has one input channel."""
    weight = _folded(weights, name)
    span = dilation * (weight.shape[2] - 1)
    padded = np.pad(x, ((0, 0), (span // 2, span // 2)))
    total = (
        np.zeros((len(weight), x.shape[1]), np.float32) + weights.tensor(f"{name}.bias")[:, None]
    )
    for k in range(weight.shape[2]):
        tap = padded[:, k * dilation : k * dilation + x.shape[1]]
        is_depthwise = weight.shape[1] == 1 < len(x)
        total += weight[:, :, k] * tap if is_depthwise else weight[:, :, k] @ tap
    return total


def _upsample(weights: CodecWeights, x: Floats, name: str, stride: int) -> Floats:
    """The transposed convolution of kernel 2S: (C, N) to (C / 2, N * S)."""
    weight, size = _folded(weights, name), x.shape[1]
    spread = np.zeros((weight.shape[1], (size + 1) * stride), np.float32)
    for k in range(2 * stride):
        spread[:, k : k + size * stride : stride] += weight[:, :, k].T @ x
    begin = (stride + 1) // 2
    bias = weights.tensor(f"{name}.bias")[:, None]
    return np.asarray(spread[:, begin : begin + size * stride] + bias)


def _snake(x: Floats, alpha: Floats) -> Floats:
    return np.asarray(x + np.sin(alpha[0] * x) ** 2 / (alpha[0] + np.float32(1e-9)))


def _folded(weights: CodecWeights, name: str) -> Floats:
    """A weight-normalised weight."""
    gain = weights.tensor(f"{name}.parametrizations.weight.original0")
    direction = weights.tensor(f"{name}.parametrizations.weight.original1")
    norm = np.sqrt(np.square(direction).sum(axis=(1, 2), keepdims=True))
    return np.asarray(gain * direction / norm)
