"""The encoder: from an utterance to audio features.

whole    the encoder sees its whole window, the utterance followed by silence, as in training: exact
near     it sees the utterance and a second of silence: the features differ, and the time is that of
         the utterance instead of 30 seconds
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
"""Frames of silence after the utterance in a near window: a second."""


class EncoderGraph(Protocol):
    """Computes `encoder.onnx`. Not thread-safe."""

    def encode(self, log_mel: Array, num_frames: int) -> Array:
        """Return the first features (num_frames, C) of a log-mel spectrogram (1, M, 2 F).

        Raises BackendError if that fails, UsageError if it is closed.
        """

    def close(self) -> None:
        """Give back what it holds; idempotent."""


class Encoder:
    """Computes features of sound on a backend's graph, which it closes. Not thread-safe."""

    def __init__(
        self, graph: EncoderGraph, spec: EncoderSpec, *, window: EncoderWindow = "whole"
    ) -> None:
        self._graph = graph
        self._spec = spec
        self._window = window

    def hear(self, pcm: Array) -> Array:
        """Return the features (n, C) of 16 kHz PCM (N,), one every 20 ms.

        Raises AudioError if the PCM cannot be used, UsageError if the encoder is closed.
        """
        frames = self._spec.max_frames
        if self._window == "near":
            frames = min(num_frames(len(pcm)) + SILENT_FRAMES, frames)
        return self.hear_window(pcm, frames)

    def hear_window(self, pcm: Array, window_frames: int) -> Array:
        """The same in a window of `window_frames`."""
        mel = log_mel(pcm, self._spec)[None, :, : 2 * window_frames]
        return self._graph.encode(mel, num_frames(len(pcm)))

    def close(self) -> None:
        """Give back what it holds; idempotent."""
        self._graph.close()
