"""The encoder: an utterance in, audio features out.

whole    the encoder sees its whole window, silence behind the utterance, as it was trained: exact
near     it sees the utterance and a second of silence: other features, for the time of what was
         said instead of 30 seconds
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.features import log_mel, num_frames
from deeptalk_edge.model.spec import EncoderSpec

Array = NDArray[np.float32]
EncoderWindow: TypeAlias = Literal["whole", "near"]

SILENT_FRAMES = 50
"""Behind the utterance in a near window: a second."""


class EncoderGraph(Protocol):
    """Computes `encoder.onnx`. Not thread-safe."""

    def encode(self, log_mel: Array, num_frames: int) -> Array:
        """The first features (num_frames, C) of a log-mel spectrogram (1, M, 2 F).

        Raises BackendError if that fails, UsageError if it is closed.
        """

    def close(self) -> None:
        """Give back what it holds; doing it twice is doing it once."""


class Encoder:
    """From sound to features, on a backend's graph, which it closes. Not thread-safe."""

    def __init__(
        self, graph: EncoderGraph, spec: EncoderSpec, *, window: EncoderWindow = "whole"
    ) -> None:
        self._graph = graph
        self._spec = spec
        self._window = window

    def hear(self, pcm: Array) -> Array:
        """The features (n, C) of 16 kHz PCM (N,), a frame every 20 ms.

        Raises AudioError if the PCM cannot be used, UsageError if the encoder is closed.
        """
        frames = self._spec.max_frames
        if self._window == "near":
            frames = min(num_frames(len(pcm)) + SILENT_FRAMES, frames)
        return self.hear_window(pcm, frames)

    def hear_window(self, pcm: Array, window_frames: int) -> Array:
        """The same by a window of so many frames."""
        mel = log_mel(pcm, self._spec)[None, :, : 2 * window_frames]
        return self._graph.encode(mel, num_frames(len(pcm)))

    def close(self) -> None:
        """Give back what it holds; doing it twice is doing it once."""
        self._graph.close()
