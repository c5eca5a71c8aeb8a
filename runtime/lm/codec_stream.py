"""The codec as a stream: frames in, every sample that can no longer change out.

The graph runs `delay_samples` late, by its look-ahead, so the first frames give nothing yet;
`finish` pushes zeros until the last sample is out. All chunkings of one answer give the same
samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.manifest import CodecEntry
from deeptalk_edge.model.noise import gaussian_tape
from deeptalk_edge.model.rows import Ids

Array = NDArray[np.float32]

_ENDLESS = 1 << 40  # frames; the length of an utterance that is still being said


class CodecGraph(Protocol):
    """Runs `codec.onnx`; docs/bundle.md names its inputs and outputs."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Returns pcm (A * 2048,) and the next state. Raises UsageError if it is closed."""


class StreamingCodec:
    """Decodes one answer. One owner; not thread-safe."""

    def __init__(self, graph: CodecGraph, entry: CodecEntry, *, seed: int = 0) -> None:
        self._graph, self._entry, self._seed = graph, entry, seed
        self._frame_samples = entry.spec.frame_samples
        self._state = np.zeros(entry.state_size, np.float32)
        self._num_frames = 0  # pushed to the graph, the zeros of `finish` included
        self._num_samples = 0  # given out

    def push(self, frames: Ids) -> Array:
        """Take frames (A, K); returns the samples that are final now and were not before."""
        return self._run(frames, _ENDLESS)

    def finish(self) -> Array:
        """The utterance is over: returns the samples still held back."""
        length = self._num_frames
        if not length:
            return np.empty(0, np.float32)
        num_zeros = -(-self._entry.delay_samples // self._frame_samples)
        zeros = np.zeros((num_zeros, self._entry.spec.frame_codes), np.int64)
        left = length * self._frame_samples - self._num_samples
        return self._run(zeros, length)[:left]

    def _run(self, frames: Ids, length: int) -> Array:
        feeds: dict[str, NDArray[Any]] = {
            "codes": frames,
            "position": np.array(self._num_frames, np.int64),
            "length": np.array(length, np.int64),
            "state": self._state,
        }
        for block, rate in enumerate(self._entry.noise_rates):
            first, count = self._num_frames * rate, len(frames) * rate
            feeds[f"noise_{block}"] = gaussian_tape(self._seed, block, first, count)
        late, self._state = self._graph.run(feeds)
        held = max(self._entry.delay_samples - self._num_frames * self._frame_samples, 0)
        self._num_frames += len(frames)
        pcm: Array = late[held:]
        self._num_samples += len(pcm)
        return pcm


def frames_to_sound(entry: CodecEntry) -> int:
    """Frames that must be pushed before the first sample is final."""
    return entry.delay_samples // entry.spec.frame_samples + 1
