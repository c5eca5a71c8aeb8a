"""A loaded engine file: its tensors, and one execution context per profile over shared scratch
memory.

bind      sets an address and, for an input, a shape. TensorRT is called only if they changed: a
          call costs some microseconds, and a step has a hundred tensors
scratch   one buffer for all profiles of all engines of a stream, which run one after the other
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError, BackendError
from deeptalk_edge.runtime.backends.tensorrt.device import GpuDevice

Shape = tuple[int, ...]


class LoadedEngine:
    """One engine of a bundle. `attach` it to a stream before it runs."""

    def __init__(self, device: GpuDevice, bundle: Bundle, name: str) -> None:
        """Raises BackendError with TensorRT's reason if it refuses the file."""
        entry = bundle.manifest.engines[name]
        if entry.engine is None:
            raise ArtifactError(f"{bundle.path}: its {name} engine is not built yet")
        self.path, self._device = bundle.file(entry.engine), device
        self._engine: Any = device.runtime.deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is None:
            raise BackendError(
                f"{self.path}: {device.version} on {device.machine.compute_capability} does not "
                f"load it ({device.log.take_errors()}); build it again on this machine"
            )
        engine, trt = self._engine, device.trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if n not in self.inputs]
        self.num_profiles: int = engine.num_optimization_profiles
        self._contexts: list[_Context] = []

    @property
    def scratch_bytes(self) -> int:
        return int(self._engine.device_memory_size_v2)

    def attach(self, stream: int, scratch: int) -> None:
        """Make the contexts. They run on `stream` and share the device memory at `scratch`.

        Raises BackendError if TensorRT does not make one.
        """
        self._contexts = [
            _Context(self._device, self._engine, self, profile, stream, scratch)
            for profile in range(self.num_profiles)
        ]

    def dtype(self, name: str) -> np.dtype[Any]:
        """Type of a tensor. Raises ArtifactError if there is no such tensor."""
        if name not in self.inputs and name not in self.outputs:
            raise ArtifactError(
                f"{self.path}: has no tensor {name}; export the bundle again with this version"
            )
        kind = self._engine.get_tensor_dtype(name)
        dtype: np.dtype[Any] = np.dtype(self._device.trt.nptype(kind))
        return dtype

    def shape(self, name: str) -> Shape:
        """Shape of a tensor, -1 for a free dimension."""
        self.dtype(name)
        return tuple(self._engine.get_tensor_shape(name))

    def most(self, name: str, profile: int) -> Shape:
        """Largest shape of an input in a profile."""
        shape = self.shape(name)
        if -1 not in shape:
            return shape
        return tuple(self._engine.get_tensor_profile_shape(name, profile)[2])

    def num_bytes(self, name: str) -> int:
        """Size of a tensor without a free dimension."""
        shape = self.shape(name)
        if -1 in shape:
            raise ArtifactError(f"{self.path}: {name} is {shape}, expected fixed sizes")
        return int(np.prod(shape)) * self.dtype(name).itemsize

    def bind(
        self, name: str, address: int, shape: Shape | None = None, *, profile: int | None = None
    ) -> None:
        """Set a tensor's address, in one profile or in all.

        Raises BackendError if TensorRT refuses the shape or the address.
        """
        contexts = self._contexts if profile is None else [self._contexts[profile]]
        for context in contexts:
            context.bind(name, address, shape)

    def enqueue(self, profile: int = 0) -> None:
        """Start a run on the stream.

        Raises BackendError with TensorRT's reason if it refuses.
        """
        self._contexts[profile].enqueue()

    def check_capturable(self, profile: int) -> None:
        """Raises BackendError if the context reports that a CUDA graph cannot capture its run."""
        self._contexts[profile].check_capturable()

    def release(self) -> None:
        """Destroy contexts and engine; TensorRT wants this before its runtime is destroyed."""
        self._contexts, self._engine = [], None


class _Context:
    """One profile, on one stream."""

    def __init__(
        self,
        device: GpuDevice,
        engine: Any,
        loaded: LoadedEngine,
        profile: int,
        stream: int,
        scratch: int,
    ) -> None:
        self._device, self._stream, self._profile = device, stream, profile
        self._path = loaded.path
        self._shaped = {name for name in loaded.inputs if -1 in loaded.shape(name)}
        self._context = _make_context(device, engine)
        if self._context is None:
            raise self._refused("a context")
        self._context.set_device_memory(scratch, loaded.scratch_bytes)
        if not self._context.set_optimization_profile_async(profile, stream):
            raise self._refused(f"profile {profile}")
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, Shape] = {}

    def bind(self, name: str, address: int, shape: Shape | None) -> None:
        if shape is not None and self._shapes.get(name) != shape and name in self._shaped:
            if not self._context.set_input_shape(name, shape):
                raise self._refused(f"{name} of {shape}")
            self._shapes[name] = shape
        if self._addresses.get(name) != address:
            if not self._context.set_tensor_address(name, address):
                raise self._refused(f"the address of {name}")
            self._addresses[name] = address

    def enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise self._refused("to run")

    def check_capturable(self) -> None:
        if self._device.flavour.says_capturable and not self._context.is_stream_capturable(
            self._stream
        ):
            raise BackendError(
                f"{self._path}: {self._device.version} cannot capture profile {self._profile} in "
                "a CUDA graph; build the engine again, or run without graphs"
            )

    def _refused(self, what: str) -> BackendError:
        return BackendError(
            f"{self._path}: {self._device.version} refuses {what} in profile {self._profile} "
            f"({self._device.log.take_errors()})"
        )


def _make_context(device: GpuDevice, engine: Any) -> Any:
    """Make a context that uses our scratch memory."""
    trt, strategy = device.trt, device.trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not device.flavour.context_choices:
        return engine.create_execution_context(strategy)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    for name, (enumeration, member) in device.flavour.context_choices.items():
        setattr(config, name, getattr(getattr(trt, enumeration), member))
    config.set_runtime_cache(device.kernels.of(config))
    return engine.create_execution_context(config)


def attach_all(device: GpuDevice, stream: int, engines: list[LoadedEngine]) -> None:
    """Attach engines to one stream and one scratch buffer."""
    scratch = device.malloc(max(engine.scratch_bytes for engine in engines))
    for engine in engines:
        engine.attach(stream, scratch)
        device.hold(engine.release)


def bundle_file(bundle: Bundle, name: str | None) -> Path:
    """Return a file that the manifest names.

    Raises ArtifactError if the manifest does not name it.
    """
    if name is None or name not in bundle.manifest.files:
        raise ArtifactError(f"{bundle.path}: names no {name}; export the bundle again")
    return bundle.file(name)
