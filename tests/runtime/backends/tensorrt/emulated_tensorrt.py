"""The parts of TensorRT's Python API that builder.py and the runtime use, on ONNX Runtime, for
tests.

engine file   a line of JSON with the version, the GPU and the profiles, then the ONNX model with
              its weights; any other file is refused, as by TensorRT
kernels       a graph runs in ONNX Runtime; its DtMoE nodes run in the plugin's kernels, built for
              the host, on the device's memory
refusals      a shape outside of its profile, an input without address or shape, a capture before a
              first run with these shapes, scratch memory that is missing or shared by two streams

It is never installed or used for figures. `tests/.../contract/` compares it with the real modules.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tests.runtime.backends.tensorrt.emulated_cuda import EmulatorError, current

__version__ = "10.16.2.1"

SCRATCH_BYTES = 1 << 16

moe_library: Any = None
"""The plugin's kernels for the host: a `MoeLibrary`."""

compute: Any = None
"""Runs an engine instead of ONNX Runtime: called with its program, the stream, and the shapes and
addresses of its tensors. `make gpu-check` uses it to compute with torch on a real GPU."""


class TensorIOMode(enum.IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class DataType(enum.IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4 = range(10)


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class CudaGraphStrategy(enum.IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class DynamicShapesKernelSpecializationStrategy(enum.IntEnum):
    LAZY, EAGER, NONE = range(3)


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH, STRONGLY_TYPED = range(2)


class BuilderFlag(enum.IntEnum):
    TF32, REQUIRE_USER_ALLOCATION = 6, 28


class ComputeCapability(enum.IntEnum):
    SM75, SM80, SM86, SM89, SM120, SM121 = range(6)


_NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT8: np.int8,
    DataType.INT32: np.int32,
    DataType.BOOL: np.bool_,
    DataType.INT64: np.int64,
    DataType.UINT8: np.uint8,
}
_KINDS = {np.dtype(value): key for key, value in _NUMPY.items()}


def nptype(trt_type: DataType) -> Any:
    return _NUMPY[trt_type]


class ILogger:
    class Severity(enum.IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: Any, msg: str) -> None:
        """Overridden."""


# Build --------------------------------------------------------------------------------------------


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> _Network:
        return _Network()

    def create_builder_config(self) -> _Config:
        return _Config()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> Any:
        header = {
            "emulated": True,
            "version": __version__,
            "profiles": [profile.shapes for profile in config.profiles] or [{}],
            "max_aux_streams": config.max_aux_streams,
            "flags": sorted(config.flags),
        }
        return np.frombuffer(json.dumps(header).encode() + b"\n" + network.model, np.uint8)


class _Network:
    model = b""


class _Config:
    def __init__(self) -> None:
        self.max_aux_streams: int | None = None
        self.num_compute_capabilities = 0
        self.profiles: list[_Profile] = []
        self.flags: set[int] = set()

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def set_compute_capability(self, capability: ComputeCapability, index: int) -> None:
        """Emulated engines run on every GPU; the bundle's manifest names the intended ones."""

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [min, opt, max]


class OnnxParser:
    num_errors = 0

    def __init__(self, network: _Network, logger: ILogger) -> None:
        self._network = network

    def parse_from_file(self, model: str) -> bool:
        loaded = onnx.load(model, load_external_data=False)
        for tensor in loaded.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                _bring_in(tensor, Path(model).parent)
        self._network.model = loaded.SerializeToString()
        return True


def _bring_in(tensor: onnx.TensorProto, folder: Path) -> None:
    """Load a weight into its tensor; onnx refuses the hard links of a finished bundle."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    with (folder / where["location"]).open("rb") as file:
        file.seek(int(where["offset"]))
        tensor.raw_data = file.read(int(where["length"]))
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.DEFAULT


class _Registry:
    def load_library(self, plugin_path: str) -> object | None:
        """Accept a plugin that is a shared library; the host build has the kernels."""
        try:
            ctypes.CDLL(plugin_path)
        except OSError:
            return None
        return object()


def get_plugin_registry() -> _Registry:
    return _Registry()


# Run ----------------------------------------------------------------------------------------------


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if compute is None:
            current()  # without a driver the real module ends the process
        header, _, model = bytes(serialized_engine).partition(b"\n")
        try:
            described = json.loads(header)
            program = _program(model)
        except Exception:
            said = "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magicTag)"
            self._logger.log(ILogger.Severity.ERROR, said)
            return None
        if described["version"] != __version__:
            found = described["version"]
            said = f"The engine plan file is not compatible with this version of TensorRT: {found}"
            self._logger.log(ILogger.Severity.ERROR, said)
            return None
        return ICudaEngine(program, described["profiles"], self._logger)


_programs: dict[str, _Program] = {}


def _program(model: bytes) -> _Program:
    key = hashlib.sha256(model).hexdigest()
    if key not in _programs:
        _programs[key] = _Program(onnx.load_from_string(model))
    return _programs[key]


def _session(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class _Program:
    """A graph as sessions and, between them, the plugin's kernels."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        graph = model.graph
        self.io = {
            value.name: (mode, *_typed(value.type.tensor_type))
            for values, mode in (
                (graph.input, TensorIOMode.INPUT),
                (graph.output, TensorIOMode.OUTPUT),
            )
            for value in values
        }
        self._outputs = [value.name for value in graph.output]
        cuts = [i for i, node in enumerate(graph.node) if node.op_type == "DtMoE"]
        if not cuts:
            session = _session(model.SerializeToString())
            names = [v.name for v in session.get_inputs()], [v.name for v in session.get_outputs()]
            self._steps: list[Any] = [(session, *names)]
            return
        self._steps = list(_pieces(model, [*cuts, len(graph.node)], self._outputs))

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        values = dict(feeds)
        for step in self._steps:
            if isinstance(step, onnx.NodeProto):
                _run_moe(step, values)
            else:
                session, inputs, outputs = step
                found = session.run(outputs, {name: values[name] for name in inputs})
                values.update(zip(outputs, found, strict=True))
        return {name: values[name] for name in self._outputs}


def _typed(kind: Any) -> tuple[DataType, tuple[int, ...]]:
    dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    return _KINDS[onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)], dims


def _pieces(model: onnx.ModelProto, cuts: list[int], outputs: list[str]) -> Any:
    """The nodes between two plugins as sessions, and the plugins' own nodes."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.output, *graph.value_info, *inferred.value_info]
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}

    def described(name: str) -> Any:
        kind = kinds.get(name, onnx.TensorProto.FLOAT)
        return onnx.helper.make_tensor_value_info(name, kind, None)

    begin = 0
    for cut in cuts:
        nodes = list(graph.node[begin:cut])
        made = {name for node in nodes for name in node.output}
        used = {name for node in nodes for name in node.input if name}
        later = {name for node in graph.node[cut:] for name in node.input} | set(outputs)
        ins, outs = sorted(used - made - stored.keys()), sorted(made & later)
        if nodes:
            piece = onnx.helper.make_graph(
                nodes,
                "piece",
                [described(name) for name in ins],
                [described(name) for name in outs],
                [stored[name] for name in used if name in stored],
            )
            opsets = {"opset_imports": model.opset_import, "ir_version": model.ir_version}
            text = onnx.helper.make_model(piece, **opsets).SerializeToString()
            yield (_session(text), ins, outs)
        if cut < len(graph.node):
            yield graph.node[cut]
        begin = cut + 1


def _run_moe(node: onnx.NodeProto, values: dict[str, Any]) -> None:
    from deeptalk_edge.bench.gpu.moe_library import MoeCall, MoeConfig

    attributes: Any = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    x, ids, weights, table, arena = (np.ascontiguousarray(values[name]) for name in node.input)
    config = MoeConfig(
        weight_dtype=attributes["weight_dtype"].decode(),
        group=attributes["group"] or None,
        activation_dtype="float16",
        width=attributes["width"],
        ffn_width=attributes["ffn_width"],
        num_experts=attributes["num_experts"],
        top_k=attributes["top_k"],
    )
    tokens = x.size // x.shape[-1]
    out, missing = np.empty_like(x), np.zeros(1, np.int32)
    workspace = np.zeros(moe_library.workspace_bytes(config, tokens) + 64, np.uint8)
    moe_library.enqueue(
        config,
        MoeCall(
            tokens=tokens,
            num_slots=len(arena),
            x=x.ctypes.data,
            topk_ids=ids.ctypes.data,
            topk_weights=weights.ctypes.data,
            slot_table=table.ctypes.data,
            slot_arena=arena.ctypes.data,
            out=out.ctypes.data,
            missing=missing.ctypes.data,
            workspace=workspace.ctypes.data + (-workspace.ctypes.data % 16),
        ),
    )
    values[node.output[0]], values[node.output[1]] = out, missing


class IRuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def __init__(self) -> None:
        self.strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


compiled: list[str] = []
"""Kernels compiled by this process: the engines' hashes, as contexts were made."""


class IRuntimeCache:
    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def serialize(self) -> Any:
        kept = {"version": __version__, "kernels": sorted(self.kernels)}
        return memoryview(json.dumps(kept).encode())

    def deserialize(self, blob: Any) -> bool:
        kept = json.loads(bytes(blob))
        if kept["version"] != __version__:
            return False
        self.kernels = set(kept["kernels"])
        return True

    def compile(self, model: bytes) -> None:
        """Not a member of the real module: what it does when a context is made."""
        kernel = hashlib.sha256(model).hexdigest()
        if kernel not in self.kernels:
            compiled.append(kernel)
            self.kernels.add(kernel)


class ICudaEngine:
    device_memory_size_v2 = SCRATCH_BYTES

    def __init__(self, program: _Program, profiles: Any, logger: ILogger) -> None:
        self.program, self.logger, self._profiles = program, logger, profiles
        self.num_io_tensors = len(program.io)
        self.num_optimization_profiles = len(profiles)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.program.io)[index])

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.program.io[name][0] if name in self.program.io else TensorIOMode.NONE

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.program.io[name][1]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.program.io[name][2]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self._profiles[profile_index][name]]

    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, strategy: Any) -> IExecutionContext:
        return IExecutionContext(self, getattr(strategy, "strategy", strategy), strategy)


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, strategy: Any, config: Any) -> None:
        self.engine = engine
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise EmulatorError("a context that allocates by itself")
        self._owns_graphs = getattr(config, "cuda_graph_strategy", 0) != 0
        if (cache := getattr(config, "cache", None)) is not None:
            cache.compile(engine.program.model.SerializeToString())
        self._profile = 0
        self._scratch: tuple[int, int] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._warm: set[Any] = set()

    def _says(self, text: str) -> bool:
        self.engine.logger.log(ILogger.Severity.ERROR, text)
        return False

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % 256 or size < SCRATCH_BYTES:
            raise EmulatorError(f"set_device_memory: {size} bytes at {memory:#x}")
        self._scratch = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return profile_index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = self.engine.program.io[name][2]
        bounds = self.engine._profiles[self._profile].get(name, [declared] * 3)
        fits = len(shape) == len(declared) and all(
            size == d if d >= 0 else low <= size <= high
            for size, d, low, high in zip(shape, declared, bounds[0], bounds[2], strict=True)
        )
        if not fits:
            return self._says(
                f"setInputShape: {name} {shape} is outside profile {self._profile}: "
                f"{bounds[0]} to {bounds[2]}"
            )
        self._shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shapes.get(name, self.engine.program.io[name][2])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self.engine.program.io:
            return self._says(f"setTensorAddress: no tensor {name}")
        if memory % 256:
            raise EmulatorError(f"{name} at {memory:#x}: not aligned to 256 bytes")
        self._addresses[name] = memory
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return not self._owns_graphs

    def execute_async_v3(self, stream_handle: int) -> bool:
        io, shapes, addresses = self.engine.program.io, dict(self._shapes), dict(self._addresses)
        for name, (mode, _, shape) in io.items():
            if name not in addresses:
                return self._says(f"enqueueV3: {name} has no address")
            if mode is TensorIOMode.INPUT and -1 in shape and name not in shapes:
                return self._says(f"enqueueV3: {name} has no shape")
        if self._scratch is None:
            return self._says("enqueueV3: no device memory was set")
        if compute is not None:
            compute(self.engine.program, stream_handle, shapes, addresses)
            return True
        self._check_use(current(), stream_handle, shapes)
        program, cuda = self.engine.program, current()
        cuda.enqueue(stream_handle, lambda: _run(program, cuda, shapes, addresses))
        return True

    def _check_use(self, cuda: Any, stream: int, shapes: dict[str, tuple[int, ...]]) -> None:
        assert self._scratch is not None
        cuda.check(*self._scratch, "scratch")
        if cuda.scratch_users.setdefault(self._scratch[0], stream) != stream:
            raise EmulatorError("two streams share one scratch buffer, and may run at once")
        key = tuple(sorted(shapes.items()))
        if cuda.is_capturing(stream) and key not in self._warm:
            raise EmulatorError("captured before it ran once: TensorRT allocates in its first run")
        self._warm.add(key)


def _run(program: _Program, cuda: Any, shapes: Any, addresses: Any) -> None:
    feeds = {}
    for name, (mode, kind, shape) in program.io.items():
        if mode is TensorIOMode.INPUT:
            size = shapes.get(name, shape)
            dtype: np.dtype[Any] = np.dtype(_NUMPY[kind])
            num_bytes = int(np.prod(size)) * dtype.itemsize
            cuda.check(addresses[name], num_bytes, name)
            memory = memoryview((ctypes.c_char * num_bytes).from_address(addresses[name]))
            feeds[name] = np.frombuffer(memory.cast("B"), dtype).reshape(size)
    for name, found in program.run(feeds).items():
        content = np.ascontiguousarray(found)
        cuda.check(addresses[name], content.nbytes, name)
        ctypes.memmove(addresses[name], content.ctypes.data, content.nbytes)


def engine_parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """An engine file's description and its model, for tests that alter them."""
    header, _, model = path.read_bytes().partition(b"\n")
    return json.loads(header), model


__all__ = [name for name in dir() if not name.startswith("_")]
