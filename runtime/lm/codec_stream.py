"""The codec as a stream: it takes frames and returns each sample once it is final.

The look-ahead delays its output by `delay_samples`, so the first frames return nothing; `finish`
pushes zeros until the last sample is out. All chunkings of one answer give the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.manifest import CodecEntry
from deeptalk_edge.model.noise import gaussian_tape
from deeptalk_edge.model.rows import Ids

Array = NDArray[np.float32]

_ENDLESS = 1 << 40  # frames; length of an utterance that has not ended


class Codec(Protocol):
    """Computes `codec.onnx`, chunk by chunk; the caller keeps the state. Not thread-safe."""

    def decode(
        self,
        codes: Ids,
        *,
        position: int,
        length: int,
        state: Array,
        noise: Sequence[Array],
    ) -> tuple[Array, Array]:
        """Return samples (A * frame_samples,) of codes (A, K), delayed by the codec's look-ahead,
        and the next state (S,).

        `position` counts the frames before these, `length` the frames of the whole utterance;
        `noise` has one tape (A * rate,) for each of the codec's noise rates. Only the codec that
        returned a state can continue from it.

        Raises BackendError if that fails, UsageError if it is closed.
        """

    def close(self) -> None:
        """Release its memory; idempotent."""


class StreamingCodec:
    """Decodes one answer. One owner; not thread-safe."""

    def __init__(self, codec: Codec, entry: CodecEntry, *, seed: int = 0) -> None:
        self._codec, self._entry, self._seed = codec, entry, seed
        self._frame_samples = entry.spec.frame_samples
        self._state = np.zeros(entry.state_size, np.float32)
        self._num_frames = 0  # frames pushed to the codec, the zeros of `finish` included
        self._num_samples = 0  # samples returned

    def push(self, frames: Ids) -> Array:
        """Take frames (A, K); returns the samples that have become final."""
        return self._run(frames, _ENDLESS)

    def finish(self) -> Array:
        """The utterance is over: returns the remaining samples."""
        length = self._num_frames
        if not length:
            return np.empty(0, np.float32)
        num_zeros = -(-self._entry.delay_samples // self._frame_samples)
        zeros = np.zeros((num_zeros, self._entry.spec.frame_codes), np.int64)
        left = length * self._frame_samples - self._num_samples
        return self._run(zeros, length)[:left]

    def _run(self, frames: Ids, length: int) -> Array:
        noise = [
            gaussian_tape(self._seed, block, self._num_frames * rate, len(frames) * rate)
            for block, rate in enumerate(self._entry.noise_rates)
        ]
        late, self._state = self._codec.decode(
            frames, position=self._num_frames, length=length, state=self._state, noise=noise
        )
        held = max(self._entry.delay_samples - self._num_frames * self._frame_samples, 0)
        self._num_frames += len(frames)
        pcm = late[held:]
        self._num_samples += len(pcm)
        return pcm


def frames_to_sound(entry: CodecEntry) -> int:
    """Frames to push until the first sample is final."""
    return entry.delay_samples // entry.spec.frame_samples + 1
