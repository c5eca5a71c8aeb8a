"""Sound is decoded as soon as possible, then in growing chunks, and every sample comes once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.backends.ort.backend import OrtCodec
from deeptalk_edge.runtime.codec_chunks import CodecChunks
from deeptalk_edge.runtime.lm.codec_stream import StreamingCodec, frames_to_sound
from tests.runtime.speaking_checkpoint import CODEC

Array = NDArray[np.float32]

FRAMES = np.random.default_rng(3).integers(0, CODEC.codebook_size, (25, 7))


class CountedCodec:
    """A codec that records the number of frames of each chunk."""

    def __init__(self, bundle: Bundle) -> None:
        self._codec = OrtCodec(bundle.file(bundle.manifest.ort_graphs.codec), threads=1)
        self.num_frames: list[int] = []

    def decode(
        self, codes: Ids, *, position: int, length: int, state: Array, noise: Sequence[Array]
    ) -> tuple[Array, Array]:
        self.num_frames.append(len(codes))
        return self._codec.decode(codes, position=position, length=length, state=state, noise=noise)

    def close(self) -> None:
        self._codec.close()


def test_chunks_grow_after_the_first_sound(bundle: Bundle) -> None:
    entry, codec = bundle.manifest.codec, CountedCodec(bundle)
    chunks = CodecChunks(codec, entry, seed=5, elapsed_ms=lambda: 0.0)
    for frame in FRAMES:
        list(chunks.push(frame))
    first = frames_to_sound(entry)
    assert codec.num_frames[:7] == [first, 1, 1, 2, 2, 4, 4]


def test_every_sample_comes_once_and_is_counted(bundle: Bundle) -> None:
    entry = bundle.manifest.codec
    whole = StreamingCodec(CountedCodec(bundle), entry, seed=5)
    expected = np.concatenate([whole.push(FRAMES), whole.finish()])
    chunks = CodecChunks(CountedCodec(bundle), entry, seed=5, elapsed_ms=lambda: 0.0)
    pieces = [piece for frame in FRAMES for piece in chunks.push(frame)]
    pieces += chunks.finish()
    found = np.concatenate([piece.pcm for piece in pieces])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert chunks.num_samples == len(found)


def test_the_first_frame_and_the_first_sample_are_timed_once(bundle: Bundle) -> None:
    now_ms = iter(range(100))
    entry = bundle.manifest.codec
    chunks = CodecChunks(
        CountedCodec(bundle), entry, seed=5, elapsed_ms=lambda: float(next(now_ms))
    )
    for frame in FRAMES:
        list(chunks.push(frame))
    assert (chunks.first_frame_ms, chunks.first_sample_ms) == (0.0, 1.0)


def test_an_answer_without_speech_has_no_sound(bundle: Bundle) -> None:
    chunks = CodecChunks(
        CountedCodec(bundle), bundle.manifest.codec, seed=5, elapsed_ms=lambda: 0.0
    )
    assert list(chunks.finish()) == []
