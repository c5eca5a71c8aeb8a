"""Decides when codec frames become sound: as soon as they give any, then in growing chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.manifest import CodecEntry
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.events import AudioChunk
from deeptalk_edge.runtime.lm.codec_stream import Codec, StreamingCodec, frames_to_sound

Array = NDArray[np.float32]

_CHUNK_FRAMES = (1, 1, 2, 2, 4)
"""Frames per chunk after the first sound: small until the loudspeaker has some sound in advance."""


class CodecChunks:
    """Decodes the sound of one answer. One owner; not thread-safe."""

    def __init__(
        self, codec: Codec, entry: CodecEntry, *, seed: int, elapsed_ms: Callable[[], float]
    ) -> None:
        """`elapsed_ms` returns the answer's time so far."""
        self._stream, self._entry = StreamingCodec(codec, entry, seed=seed), entry
        self._elapsed_ms = elapsed_ms
        self._waiting: list[Ids] = []  # frames of the next chunk
        self._num_chunks = 0
        self.num_samples = 0
        self.first_frame_ms: float | None = None
        """Time of the first complete frame; None before it."""
        self.first_sample_ms: float | None = None
        """Time of the first final sample; None before it."""

    @property
    def audio_s(self) -> float:
        """Length of the sound so far."""
        return self.num_samples / self._entry.spec.sampling_rate

    def push(self, frame: Ids) -> Iterator[AudioChunk]:
        """Add a frame (K,); yields sound that can be decoded now."""
        if self.first_frame_ms is None:
            self.first_frame_ms = self._elapsed_ms()
        self._waiting.append(frame)
        if self._num_chunks == 0:
            enough = frames_to_sound(self._entry)
        else:
            enough = _CHUNK_FRAMES[min(self._num_chunks, len(_CHUNK_FRAMES)) - 1]
        if len(self._waiting) >= enough:
            yield from self._sound(self._decode_waiting())

    def finish(self) -> Iterator[AudioChunk]:
        """The answer is complete: yields the remaining sound."""
        yield from self._sound(self._decode_waiting())
        yield from self._sound(self._stream.finish())

    def _decode_waiting(self) -> Array:
        if not self._waiting:
            return np.empty(0, np.float32)
        frames, self._waiting = np.stack(self._waiting), []
        self._num_chunks += 1
        return self._stream.push(frames)

    def _sound(self, pcm: Array) -> Iterator[AudioChunk]:
        if not pcm.size:
            return
        if self.first_sample_ms is None:
            self.first_sample_ms = self._elapsed_ms()
        self.num_samples += pcm.size
        yield AudioChunk(pcm)
