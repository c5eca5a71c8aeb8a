"""`native_codec.bin`: SNAC's decoder as native/cpu/codec.cpp takes it, float32, in its order.

No index: places follow from the codec's sizes. Every array begins at a multiple of 64 bytes.

    scales     the codebook of each
    layers     in the order of graphs/codec.py; a block's noise between its upsampling and its units
    end        the last convolution (7 x C) and its bias

A layer is a matrix or depthwise, then its bias and, where a snake follows, alpha and 1 / alpha,
each of them as long as the columns, filled up to whole panels.

    matrix     (panels, inputs, 32): the columns of a panel lie together, the last one filled up
    depthwise  (7, C)

The inputs of a matrix are its taps' channels, the earliest sample first; an upsampling by S has the
channels of its S samples as columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deeptalk_edge.checkpoint.codec import CodecWeights
from deeptalk_edge.export.graphs.builder import Array
from deeptalk_edge.export.graphs.codec import (
    CodecNoise,
    checked_tensor,
    folded_weight,
)
from deeptalk_edge.model.spec import CodecSpec

_PANEL_COLUMNS = 32
_ALIGN_FLOATS = 16
_KERNEL = 7
_UNITS = 3


def write_native_codec(weights: CodecWeights, noise: CodecNoise, path: Path) -> None:
    """Write the weights that `export_codec` puts into codec.onnx.

    Raises ArtifactError if a tensor is missing or has another shape than its config says.
    """
    with path.open("wb") as file:
        for array in _Arrays(weights, with_noise=noise == "tape" and weights.spec.noise).all():
            flat = np.asarray(array, np.float32).ravel()
            file.write(np.pad(flat, (0, -flat.size % _ALIGN_FLOATS)).data)


def native_codec_bytes(spec: CodecSpec, noise: CodecNoise) -> int:
    """The size of the file."""
    num_scales = len(spec.vq_strides)
    first_taps = 1 if spec.depthwise else _KERNEL
    total = num_scales * _aligned(spec.codebook_size * spec.codebook_dim)
    total += _matrix_floats(num_scales * spec.codebook_dim, spec.latent_dim, 1)
    if spec.depthwise:
        total += _aligned(_KERNEL * spec.latent_dim) + _padded(spec.latent_dim)
    total += _matrix_floats(first_taps * spec.latent_dim, spec.decoder_dim, 3)
    channels = spec.decoder_dim
    for rate in spec.decoder_rates:
        has_noise = noise == "tape" and spec.noise
        channels //= 2
        total += _matrix_floats(4 * channels, rate * channels, 1 if has_noise else 3)
        total += _matrix_floats(channels, channels, 3) if has_noise else 0
        wide = _aligned(_KERNEL * channels) + 3 * _padded(channels)
        if not spec.depthwise:
            wide = _matrix_floats(_KERNEL * channels, channels, 3)
        total += _UNITS * (wide + _matrix_floats(channels, channels, 3))
    return 4 * (total + _aligned(_KERNEL * channels) + _ALIGN_FLOATS)


def _matrix_floats(inputs: int, columns: int, vectors: int) -> int:
    return (inputs + vectors) * _padded(columns)


def _padded(columns: int) -> int:
    return -(-columns // _PANEL_COLUMNS) * _PANEL_COLUMNS


def _aligned(floats: int) -> int:
    return -(-floats // _ALIGN_FLOATS) * _ALIGN_FLOATS


class _Arrays:
    """The arrays in the file's order."""

    def __init__(self, weights: CodecWeights, *, with_noise: bool) -> None:
        self._weights, self._spec, self._with_noise = weights, weights.spec, with_noise

    def all(self) -> Iterator[Array]:
        spec = self._spec
        yield from self._quantizer()
        first_snake = "decoder.model.2.block.0" if spec.depthwise else "decoder.model.1.block.0"
        if spec.depthwise:
            yield from self._wide("decoder.model.0", spec.latent_dim, spec.latent_dim, None)
            yield from self._pointwise(
                "decoder.model.1", spec.decoder_dim, spec.latent_dim, first_snake
            )
        else:
            yield from self._wide("decoder.model.0", spec.decoder_dim, spec.latent_dim, first_snake)
        first_block = 2 if spec.depthwise else 1
        channels = spec.decoder_dim
        last = first_block + len(spec.decoder_rates)
        for i, rate in enumerate(spec.decoder_rates):
            channels //= 2
            is_last = first_block + i + 1 == last
            after = f"decoder.model.{first_block + i + 1}" + ("" if is_last else ".block.0")
            yield from self._block(f"decoder.model.{first_block + i}.block", channels, rate, after)
        weight = folded_weight(self._weights, f"decoder.model.{last + 1}", 1, channels, _KERNEL)
        yield weight[0].T
        yield self._bias(f"decoder.model.{last + 1}", 1)

    def _quantizer(self) -> Iterator[Array]:
        spec = self._spec
        projections, bias = [], np.zeros(spec.latent_dim, np.float32)
        for i in range(len(spec.vq_strides)):
            name = f"quantizer.quantizers.{i}"
            shape = (spec.codebook_size, spec.codebook_dim)
            yield checked_tensor(self._weights, f"{name}.codebook.weight", *shape)
            shape = (spec.latent_dim, spec.codebook_dim)
            projections.append(folded_weight(self._weights, f"{name}.out_proj", *shape, 1)[:, :, 0])
            bias += self._bias(f"{name}.out_proj", spec.latent_dim)
        yield from self._matrix(np.concatenate(projections, axis=1).T, bias, None)

    def _block(self, name: str, channels: int, rate: int, next_snake: str) -> Iterator[Array]:
        """`channels` are those that come out."""
        first_unit = 3 if self._spec.noise else 2
        snakes = [f"{name}.{first_unit + unit}.block.0" for unit in range(_UNITS)] + [next_snake]
        weight = folded_weight(self._weights, f"{name}.1", 2 * channels, channels, 2 * rate)
        # The kernel's second half falls on the next input's samples.
        now, later = np.split(weight.transpose(2, 0, 1), 2)
        both = np.concatenate([later, now], axis=1).transpose(1, 0, 2)
        bias = self._bias(f"{name}.1", channels)
        behind = None if self._with_noise else snakes[0]
        yield from self._matrix(both.reshape(4 * channels, -1), bias, behind, rate)
        if self._with_noise:
            loudness = folded_weight(self._weights, f"{name}.2.linear", channels, channels, 1)
            silent = np.zeros(channels, np.float32)
            yield from self._matrix(loudness[:, :, 0].T, silent, snakes[0])
        for unit in range(_UNITS):
            inner = f"{name}.{first_unit + unit}.block"
            yield from self._wide(f"{inner}.1", channels, channels, f"{inner}.2")
            yield from self._pointwise(f"{inner}.3", channels, channels, snakes[unit + 1])

    def _wide(
        self, name: str, channels_out: int, channels_in: int, snake: str | None
    ) -> Iterator[Array]:
        """A convolution of kernel 7."""
        bias = self._bias(name, channels_out)
        width = 1 if self._spec.depthwise else channels_in
        weight = folded_weight(self._weights, name, channels_out, width, _KERNEL)
        if self._spec.depthwise:
            yield weight[:, 0].T
            yield from self._ending(bias, snake)
        else:
            yield from self._matrix(
                weight.transpose(2, 1, 0).reshape(-1, channels_out), bias, snake
            )

    def _pointwise(
        self, name: str, channels_out: int, channels_in: int, snake: str | None
    ) -> Iterator[Array]:
        weight = folded_weight(self._weights, name, channels_out, channels_in, 1)
        yield from self._matrix(weight[:, :, 0].T, self._bias(name, channels_out), snake)

    def _matrix(
        self, matrix: Array, bias: Array, snake: str | None, repeats: int = 1
    ) -> Iterator[Array]:
        inputs = len(matrix)
        filled = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % _PANEL_COLUMNS)))
        yield filled.reshape(inputs, -1, _PANEL_COLUMNS).transpose(1, 0, 2)
        yield from self._ending(bias, snake, repeats)

    def _ending(self, bias: Array, snake: str | None, repeats: int = 1) -> Iterator[Array]:
        """The bias, and the snake after it, for so many samples."""
        yield _fill(np.tile(bias, repeats), 0)
        if snake is not None:
            alpha = checked_tensor(self._weights, f"{snake}.alpha", 1, bias.size, 1).ravel()
            alpha = np.tile(alpha, repeats)
            yield _fill(alpha, 1)
            yield _fill(1 / (alpha + np.float32(1e-9)), 1)

    def _bias(self, name: str, channels: int) -> Array:
        return checked_tensor(self._weights, f"{name}.bias", channels)


def _fill(vector: Array, value: float) -> Array:
    """Up to whole panels."""
    return np.pad(vector, (0, -vector.size % _PANEL_COLUMNS), constant_values=value)
