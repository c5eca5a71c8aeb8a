"""The TensorRT backend of a bundle: encoder, language model and codec on one GPU.

streams   encoder and language model share one, and one scratch buffer; the codec has an urgent one
          of its own, so its few kernels do not wait for a step of hundreds
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from deeptalk_edge.bundle.manifest import ENGINES
from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.lifetime import Lifetime
from deeptalk_edge.runtime.backends.tensorrt.codec import TensorrtCodec
from deeptalk_edge.runtime.backends.tensorrt.device import Device, open_device
from deeptalk_edge.runtime.backends.tensorrt.encoder import TensorrtEncoder
from deeptalk_edge.runtime.backends.tensorrt.engine import TensorrtEngine
from deeptalk_edge.runtime.backends.tensorrt.engine_file import LoadedEngine, attach_all

TOLERANCE = {"float32": 1e-3, "float16": 2e-2}
"""Largest error over the largest value in the golden check, by the precision of the cache. Float32
differs by the order of sums, 1e-5; float16 by its roundings, 4e-3 where torch computed the same
graphs. A wrong weight, expert or row gives 0.1 and more."""


class TensorrtBackend:
    """What a conversation runs on. `close` gives everything back."""

    def __init__(
        self, bundle: Bundle, *, context_rows: int, num_items: int, uses_graphs: bool = True
    ) -> None:
        """Check the machine, then load everything.

        Raises BackendError if CUDA, TensorRT or the plugin cannot be used, ArtifactError if the
        bundle is not for this machine, DoesNotFit if the device has not enough memory,
        SettingsError if the engines were built for less than what is asked for.
        """
        manifest = bundle.manifest
        self._device = device = open_device(bundle)
        with _closing_on_error(device):
            main, urgent = device.stream(), device.stream(is_urgent=True)
            engines = {name: LoadedEngine(device, bundle, name) for name in ENGINES}
            attach_all(device, main, [engines[n] for n in ENGINES if n != "codec"])
            attach_all(device, urgent, [engines["codec"]])
            self.encoder = TensorrtEncoder(
                device, engines["encoder"], manifest.model.encoder, stream=main
            )
            self.codec = TensorrtCodec(device, engines["codec"], manifest.codec, stream=urgent)
            self.engine = TensorrtEngine(
                device,
                bundle,
                engines,
                stream=main,
                context_rows=context_rows,
                num_items=num_items,
                uses_graphs=uses_graphs,
            )
        self.tolerance = TOLERANCE[manifest.precision["kv_cache"]]
        self._lifetime = Lifetime("the TensorRT backend", self._give_back)

    def close(self) -> None:
        """Give back what the device holds; doing it twice is doing it once."""
        self._lifetime.close()

    def _give_back(self) -> None:
        for part in (self.engine, self.codec, self.encoder):
            part.close()
        self._device.close()


@contextmanager
def _closing_on_error(device: Device) -> Iterator[None]:
    try:
        yield
    except BaseException:
        device.close()
        raise
