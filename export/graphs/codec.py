"""`codec.onnx`: SNAC's decoder as a stream, exact to the whole decode in any chunking.

Every convolution keeps the samples to its left as state and gives its output late by the samples
to its right, so each layer runs on its own delayed clock. What is before the first sample or
after the last one on that clock is set to zero: that is the zero padding of the whole decode, at
both ends.

A layer's delay is D output samples of the layers before it, plus its own:

    convolution of kernel k, dilation d     D + d (k - 1) / 2
    upsampling by S                         D S + ceil(S / 2)

Weight normalisation is folded. An upsampling convolution of kernel 2S is one product of the last
two samples with a (2 C_in, S C_out) matrix, which ONNX Runtime packs and ConvTranspose does not.

In float16 (never bfloat16: TensorRT-RTX 1.7.1 builds no deconvolution in it, and 8 bits are
audible) the snakes and the last tanh are float32. No size follows from a value, so an engine takes
position and length as plain inputs.

Source: hubertsiuzdak/snac `layers.py`, `vq.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from deeptalk_edge.checkpoint.codec import CodecWeights
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.export.graphs.builder import FLOAT, INT64, Array, Graph, Precision

CodecNoise = Literal["off", "tape"]

_DILATIONS = (1, 3, 9)
_KERNEL = 7
_END = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecGraph:
    """What a caller of codec.onnx must know."""

    delay_samples: int
    state_size: int
    noise_rates: tuple[int, ...]
    """Noise samples for each codec frame, one rate per noise input."""


def export_codec(
    weights: CodecWeights, noise: CodecNoise, directory: Path, *, precision: Precision = "float32"
) -> CodecGraph:
    """Write codec.onnx and its weights.

    Raises ArtifactError if a tensor is missing or has another shape than its config says.
    """
    spec = weights.spec
    with Graph(directory, "codec", precision=precision) as graph:
        codec = _Codec(graph, weights, with_noise=noise == "tape" and spec.noise)
        graph.output(graph.reshape(codec.decode(), -1), "pcm", ("N",))
        codec.declare_state()
    return CodecGraph(
        delay_samples=codec.delay, state_size=codec.state_size, noise_rates=tuple(codec.noise_rates)
    )


class _Codec:
    """Writes the layers in order. Values are (1, C, N); `_rate`, in samples for each codec frame,
    and `delay` are the clock of the value written last."""

    def __init__(self, graph: Graph, weights: CodecWeights, *, with_noise: bool) -> None:
        self._graph = graph
        self._weights = weights
        self._spec = weights.spec
        self._with_noise = with_noise
        self._rate = self._spec.vq_strides[0]
        self.delay = 0
        self.state_size = 0
        self.noise_rates: list[int] = []
        self._next_states: list[str] = []
        self._clocks: dict[int, tuple[str, str]] = {}
        self._codes = graph.input("codes", INT64, ("A", self._spec.frame_codes))
        self._position = graph.input("position", INT64, ())
        # Later than any utterance's end, and small enough that its product with a rate is an int64.
        never = graph.constant(np.array(2**40, np.int64))
        self._length = graph.op("Min", graph.input("length", INT64, ()), never)
        self._num_frames = graph.op("Squeeze", graph.op("Shape", self._codes, start=0, end=1))

    def decode(self) -> str:
        """From the codes to samples (1, 1, N)."""
        spec, graph = self._spec, self._graph
        x = self._latents()
        if spec.depthwise:
            x = self._wide(x, "decoder.model.0", spec.latent_dim, spec.latent_dim, depthwise=True)
            x = self._pointwise(x, "decoder.model.1", spec.decoder_dim, spec.latent_dim)
            first_block = 2
        else:
            x = self._wide(x, "decoder.model.0", spec.decoder_dim, spec.latent_dim)
            first_block = 1
        x = self._silence_outside(x)
        channels = spec.decoder_dim
        for i, stride in enumerate(spec.decoder_rates):
            x = self._block(x, f"decoder.model.{first_block + i}.block", channels, stride)
            channels //= 2
        last = first_block + len(spec.decoder_rates)
        x = self._snake(x, f"decoder.model.{last}", channels)
        x = self._silence_outside(self._wide(x, f"decoder.model.{last + 1}", 1, channels))
        return graph.op("Tanh", graph.exact(x))

    def declare_state(self) -> None:
        """Declare the state's input and output, now that its size is known."""
        shape = (self.state_size,)
        self._graph.input("state", self._graph.float_type, shape)
        joined = self._graph.op("Concat", *self._next_states, axis=0)
        self._graph.output(joined, "next_state", shape, data_type=self._graph.float_type)

    def _latents(self) -> str:
        """The sum of all scales' latents (1, C, N); absent frames have none."""
        graph, spec = self._graph, self._spec
        new_frames = graph.op("Range", self._int(0), self._num_frames, self._int(1))
        frames = graph.op("Add", new_frames, self._position)
        present = graph.op("Unsqueeze", graph.op("Less", frames, self._length), graph.ints(1))
        codes = graph.op("Where", present, self._codes, self._int(0))
        widths = [spec.vq_strides[0] // stride for stride in spec.vq_strides]
        rows, projections, bias = [], [], np.zeros(spec.latent_dim, np.float32)
        for i, scale in enumerate(graph.split(codes, widths, axis=1)):
            name, stride = f"quantizer.quantizers.{i}", spec.vq_strides[i]
            table = self._tensor(f"{name}.codebook.weight", spec.codebook_size, spec.codebook_dim)
            found = graph.op("Gather", graph.weight(f"{name}.codebook", table), scale, axis=0)
            each = graph.op("Unsqueeze", found, graph.ints(2))
            repeated = graph.op("Expand", each, graph.ints(1, 1, stride, 1))
            rows.append(graph.reshape(repeated, -1, spec.codebook_dim))
            projections.append(
                self._folded(f"{name}.out_proj", spec.latent_dim, spec.codebook_dim, 1)
            )
            bias += self._tensor(f"{name}.out_proj.bias", spec.latent_dim)
        projection = np.concatenate(projections, axis=1)[:, :, 0]
        latents = graph.op(
            "MatMul",
            graph.op("Concat", *rows, axis=1),
            graph.weight("quantizer.out_proj", projection.T),
        )
        latents = graph.op("Add", latents, graph.weight("quantizer.bias", bias))
        by_channel = graph.op("Transpose", latents, perm=[1, 0])
        return self._silence_outside(graph.op("Unsqueeze", by_channel, graph.ints(0)))

    def _block(self, x: str, name: str, channels: int, stride: int) -> str:
        """`stride` times more samples in half as many channels, noise, three residual units."""
        x = self._snake(x, f"{name}.0", channels)
        x = self._upsample(x, f"{name}.1", channels, stride)
        first_unit = 2
        if self._spec.noise:
            first_unit = 3
            if self._with_noise:
                x = self._add_noise(x, f"{name}.2.linear", channels // 2)
        for i, dilation in enumerate(_DILATIONS):
            x = self._residual_unit(x, f"{name}.{first_unit + i}.block", channels // 2, dilation)
        return x

    def _upsample(self, x: str, name: str, channels: int, stride: int) -> str:
        """(1, C, N) to (1, C / 2, N * stride)."""
        graph, halved = self._graph, channels // 2
        weight = self._folded(name, channels, halved, 2 * stride)
        bias = np.tile(self._tensor(f"{name}.bias", halved), stride)
        # The kernel's second half falls on the next input's samples: (S, C_in, C_out) each.
        now, later = np.split(weight.transpose(2, 0, 1), 2)
        product = np.concatenate([later, now], axis=1).transpose(1, 0, 2).reshape(2 * channels, -1)
        before = self._slice(self._with_history(x, channels, 1), 0, -1)
        pair = graph.op("Concat", before, x, axis=1)
        x = graph.op("Transpose", pair, perm=[0, 2, 1])
        x = graph.op("MatMul", x, graph.weight(f"{name}.weight", product))
        x = graph.op("Add", x, graph.weight(f"{name}.bias", bias))
        x = graph.op("Transpose", graph.reshape(x, 1, -1, halved), perm=[0, 2, 1])
        self._rate *= stride
        self.delay = self.delay * stride + (stride + 1) // 2
        return self._silence_outside(x)

    def _add_noise(self, x: str, name: str, channels: int) -> str:
        """x + noise * (W x); the noise comes on the undelayed clock and waits here."""
        graph = self._graph
        noise = graph.input(f"noise_{len(self.noise_rates)}", FLOAT, (f"N_{self._rate}",))
        self.noise_rates.append(self._rate)
        noise = self._delayed(graph.reshape(graph.half(noise), 1, 1, -1), 1, self.delay)
        weight = graph.weight(f"{name}.weight", self._folded(name, channels, channels, 1))
        loudness = graph.op("Conv", x, weight, kernel_shape=[1])
        return graph.op("Add", x, graph.op("Mul", noise, loudness))

    def _residual_unit(self, x: str, name: str, channels: int, dilation: int) -> str:
        depthwise = self._spec.depthwise
        y = self._snake(x, f"{name}.0", channels)
        y = self._wide(y, f"{name}.1", channels, channels, dilation=dilation, depthwise=depthwise)
        y = self._snake(y, f"{name}.2", channels)
        y = self._pointwise(y, f"{name}.3", channels, channels)
        skipped = self._delayed(x, channels, dilation * (_KERNEL - 1) // 2)
        return self._silence_outside(self._graph.op("Add", skipped, y))

    def _wide(
        self,
        x: str,
        name: str,
        channels_out: int,
        channels_in: int,
        *,
        dilation: int = 1,
        depthwise: bool = False,
    ) -> str:
        """A convolution of kernel 7 over the history and the new samples."""
        history = dilation * (_KERNEL - 1)
        groups = channels_in if depthwise else 1
        weight = self._folded(name, channels_out, channels_in // groups, _KERNEL)
        self.delay += history // 2
        return self._graph.op(
            "Conv",
            self._with_history(x, channels_in, history),
            self._graph.weight(f"{name}.weight", weight),
            self._graph.weight(f"{name}.bias", self._tensor(f"{name}.bias", channels_out)),
            kernel_shape=[_KERNEL],
            dilations=[dilation],
            group=groups,
        )

    def _pointwise(self, x: str, name: str, channels_out: int, channels_in: int) -> str:
        return self._graph.op(
            "Conv",
            x,
            self._graph.weight(f"{name}.weight", self._folded(name, channels_out, channels_in, 1)),
            self._graph.weight(f"{name}.bias", self._tensor(f"{name}.bias", channels_out)),
            kernel_shape=[1],
        )

    def _snake(self, x: str, name: str, channels: int) -> str:
        """x + sin(ax)^2 / a."""
        graph = self._graph
        alpha = self._tensor(f"{name}.alpha", 1, channels, 1)
        exact = graph.exact(x)
        sine = graph.op("Sin", graph.op("Mul", exact, self._exact_weight(f"{name}.alpha", alpha)))
        inverse = self._exact_weight(f"{name}.inverse", 1 / (alpha + np.float32(1e-9)))
        bent = graph.op("Mul", graph.op("Mul", sine, sine), inverse)
        return graph.half(graph.op("Add", exact, bent))

    def _exact_weight(self, name: str, array: Array) -> str:
        return self._graph.weight(name, array, precision="float32")

    def _with_history(self, x: str, channels: int, samples: int) -> str:
        """The last `samples` of the calls before, then x; keeps the last ones for the next call."""
        graph, begin = self._graph, self.state_size
        self.state_size += channels * samples
        past = self._slice("state", begin, self.state_size, axis=0)
        joined = graph.op("Concat", graph.reshape(past, 1, channels, samples), x, axis=2)
        self._next_states.append(graph.reshape(self._slice(joined, -samples, _END), -1))
        return joined

    def _delayed(self, x: str, channels: int, samples: int) -> str:
        """x as it was `samples` ago."""
        return self._slice(self._with_history(x, channels, samples), 0, -samples)

    def _silence_outside(self, x: str) -> str:
        """Zero what is before the first sample or after the last one on this layer's clock."""
        graph = self._graph
        clock, end = self._clock()
        begins = graph.op("GreaterOrEqual", clock, self._int(self.delay))
        ends = graph.op("Less", clock, graph.op("Add", end, self._int(self.delay)))
        inside = graph.op("Cast", graph.op("And", begins, ends), to=graph.float_type)
        return graph.op("Mul", x, inside)

    def _clock(self) -> tuple[str, str]:
        """Undelayed sample numbers (N,) of this call at `_rate`, and the utterance's end."""
        if self._rate not in self._clocks:
            graph, rate = self._graph, self._int(self._rate)
            size = graph.op("Mul", self._num_frames, rate)
            new_samples = graph.op("Range", self._int(0), size, self._int(1))
            samples = graph.op("Add", new_samples, graph.op("Mul", self._position, rate))
            self._clocks[self._rate] = (samples, graph.op("Mul", self._length, rate))
        return self._clocks[self._rate]

    def _slice(self, x: str, begin: int, end: int, *, axis: int = 2) -> str:
        graph = self._graph
        return graph.op("Slice", x, graph.ints(begin), graph.ints(end), graph.ints(axis))

    def _int(self, value: int) -> str:
        return self._graph.constant(np.array(value, np.int64))

    def _folded(self, name: str, *shape: int) -> Array:
        return folded_weight(self._weights, name, *shape)

    def _tensor(self, name: str, *shape: int) -> Array:
        return checked_tensor(self._weights, name, *shape)


def folded_weight(weights: CodecWeights, name: str, *shape: int) -> Array:
    """A weight-normalised weight: g v / |v|, the norm over all axes but the first."""
    gain = checked_tensor(weights, f"{name}.parametrizations.weight.original0", shape[0], 1, 1)
    direction = checked_tensor(weights, f"{name}.parametrizations.weight.original1", *shape)
    norm = np.sqrt(np.square(direction, dtype=np.float64).sum(axis=(1, 2), keepdims=True))
    return np.asarray(direction * (gain / norm), np.float32)


def checked_tensor(weights: CodecWeights, name: str, *shape: int) -> Array:
    """A tensor that must be there and have this shape.

    Raises ArtifactError if it is not.
    """
    if name not in weights.shapes:
        raise ArtifactError(f"the SNAC checkpoint lacks the tensor {name}")
    if weights.shapes[name] != shape:
        raise ArtifactError(
            f"SNAC's {name} is {list(weights.shapes[name])}, its config.json says {list(shape)}"
        )
    return weights.tensor(name)
