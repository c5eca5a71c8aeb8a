"""`EncoderGraph` on TensorRT: it always takes the model's whole window."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.lifetime import Lifetime, while_open
from deeptalk_edge.model.spec import EncoderSpec
from deeptalk_edge.runtime.backends.tensorrt.device import GpuDevice
from deeptalk_edge.runtime.backends.tensorrt.engine_file import LoadedEngine

Array = NDArray[np.float32]


class TensorrtEncoder:
    """The encoder's engine. Not thread-safe."""

    def __init__(
        self, device: GpuDevice, engine: LoadedEngine, spec: EncoderSpec, *, stream: int
    ) -> None:
        """Raises ArtifactError if the engine is for another window."""
        self._cuda, self._engine, self._stream = device.cuda, engine, stream
        mel = (1, spec.num_mel_bins, 2 * spec.max_frames)
        shape = engine.shape("features")
        if engine.shape("log_mel") != mel or shape[0] != spec.max_frames:
            raise ArtifactError(
                f"{engine.path}: made for a window of {engine.shape('log_mel')}, the model's is "
                f"{mel}; export the bundle again"
            )
        self._inputs = device.pinned(engine.num_bytes("log_mel"))
        self._outputs = device.pinned(engine.num_bytes("features"))
        self._mel = self._inputs.view(engine.dtype("log_mel").type, mel)
        self._features = self._outputs.view(engine.dtype("features").type, shape)
        self._mel_at = device.malloc(self._mel.nbytes)
        self._features_at = device.malloc(self._features.nbytes)
        engine.bind("log_mel", self._mel_at)
        engine.bind("features", self._features_at)
        self._stopwatch = device.stopwatch("encoder", stream)
        self._lifetime = Lifetime("the encoder", device.share())

    @while_open
    def encode(self, log_mel: Array, num_frames: int) -> Array:
        """Return the first features (num_frames, C) of a log-mel spectrogram (1, M, 2 F) of the
        whole window.

        Raises BackendError if the device fails, UsageError if the encoder is closed.
        """
        self._mel[...] = log_mel
        cuda, stream = self._cuda, self._stream
        self._stopwatch.start()
        cuda.copy_to_device(self._mel_at, self._inputs.address, self._mel.nbytes, stream)
        self._engine.enqueue()
        size = self._features.nbytes
        cuda.copy_to_host(self._outputs.address, self._features_at, size, stream)
        self._stopwatch.stop()
        cuda.synchronize(stream)
        self._stopwatch.read()
        return self._features[:num_frames].astype(np.float32, copy=True)

    def close(self) -> None:
        """Release its share of the device; idempotent."""
        self._lifetime.close()
