"""`Codec` on TensorRT, on a stream of high priority.

A chunk is decoded while the next step of the language model runs. The engine takes at most 16
frames at a time; longer chunks run in parts, which pass the state on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.manifest import CodecEntry
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.lifetime import Lifetime, while_open
from deeptalk_edge.model.rows import Ids
from deeptalk_edge.runtime.backends.tensorrt.device import GpuDevice, Pinned
from deeptalk_edge.runtime.backends.tensorrt.engine_file import LoadedEngine

Array = NDArray[Any]


class TensorrtCodec:
    """SNAC's streaming decoder. One owner; not thread-safe."""

    def __init__(
        self, device: GpuDevice, engine: LoadedEngine, entry: CodecEntry, *, stream: int
    ) -> None:
        """Raises ArtifactError if the engine is for another codec."""
        self._cuda, self._engine, self._stream = device.cuda, engine, stream
        self._entry = entry
        if engine.shape("state") != (entry.state_size,):
            raise ArtifactError(
                f"{engine.path}: a state of {engine.shape('state')} values, the manifest says "
                f"{entry.state_size}; export the bundle again"
            )
        self._most_frames = engine.most("codes", 0)[0]
        self._inputs = {name: self._buffer(device, name) for name in engine.inputs}
        pcm = self._most_frames * entry.spec.frame_samples
        self._outputs = {
            name: self._made(device, name, num_bytes * engine.dtype(name).itemsize)
            for name, num_bytes in (("pcm", pcm), ("next_state", entry.state_size))
        }
        self._stopwatch = device.stopwatch("codec", stream)
        self._lifetime = Lifetime("the codec", device.share())

    @while_open
    def decode(
        self, codes: Ids, *, position: int, length: int, state: Array, noise: Sequence[Array]
    ) -> tuple[Array, Array]:
        """Return samples (A * frame_samples,) of codes (A, K) and the next state. See `Codec`."""
        sounds = []
        for first in range(0, len(codes), self._most_frames):
            part = codes[first : first + self._most_frames]
            last = first + len(part)
            rates = zip(noise, self._entry.noise_rates, strict=True)
            tapes = {f"noise_{i}": t[first * r : last * r] for i, (t, r) in enumerate(rates)}
            feeds = {"codes": part, "position": position + first, "length": length, "state": state}
            sound, state = self._run(feeds | tapes, len(part))
            sounds.append(sound)
        return np.concatenate([np.empty(0, np.float32), *sounds]), state

    def _run(self, feeds: Mapping[str, Any], num_frames: int) -> tuple[Array, Array]:
        engine, cuda, stream = self._engine, self._cuda, self._stream
        self._stopwatch.start()
        for name, (pinned, address) in self._inputs.items():
            array, dtype = np.asarray(feeds[name]), engine.dtype(name)
            pinned.view(dtype.type, array.shape)[...] = array
            cuda.copy_to_device(address, pinned.address, array.size * dtype.itemsize, stream)
            engine.bind(name, address, array.shape)
        engine.enqueue()
        found = []
        samples = num_frames * self._entry.spec.frame_samples
        for name, count in (("pcm", samples), ("next_state", self._entry.state_size)):
            pinned, address = self._outputs[name]
            dtype = engine.dtype(name)
            cuda.copy_to_host(pinned.address, address, count * dtype.itemsize, stream)
            found.append(pinned.view(dtype.type, (count,)))
        self._stopwatch.stop()
        cuda.synchronize(stream)
        self._stopwatch.read()
        pcm, state = (array.astype(np.float32) for array in found)
        return pcm, state

    def close(self) -> None:
        """Release its share of the device; idempotent."""
        self._lifetime.close()

    def _buffer(self, device: GpuDevice, name: str) -> tuple[Pinned, int]:
        """Allocate an input's largest shape."""
        shape = self._engine.most(name, 0)
        return self._made(device, name, int(np.prod(shape)) * self._engine.dtype(name).itemsize)

    def _made(self, device: GpuDevice, name: str, num_bytes: int) -> tuple[Pinned, int]:
        pinned, address = device.pinned(num_bytes), device.malloc(num_bytes)
        if name in self._engine.outputs:
            self._engine.bind(name, address)
        return pinned, address
