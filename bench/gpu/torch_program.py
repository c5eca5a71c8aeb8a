"""Computes one of our graphs by torch on device pointers, as an engine does, without TensorRT.

For tier 2 of `make gpu-check`: our CUDA calls, memory, streams, graphs and plugin kernels run on a
real GPU, and torch replaces the engines. Values that depend only on shapes stay in numpy on the
host, so nothing waits for the device and a CUDA graph can capture a run. It has every kind of node
of our graphs; another kind is an error.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional as F

Value = Any
"""A tensor on the device, or an array on the host."""

RunMoe = Callable[[dict[str, Any], Sequence[Tensor]], tuple[Tensor, Tensor]]
"""Runs a DtMoE node: maps its attributes and inputs to the routed sum and the missing uses."""

_HOST_ELEMENTS = 64  # constants up to this size are shapes, axes and scalars


class TorchProgram:
    """One graph on one device."""

    def __init__(self, model: onnx.ModelProto, device: str, run_moe: RunMoe) -> None:
        self.device, self._run_moe = device, run_moe
        graph = model.graph
        self._outputs = [value.name for value in graph.output]
        self._constants: dict[str, Value] = {}
        for tensor in graph.initializer:
            array = numpy_helper.to_array(tensor)
            is_small = array.size <= _HOST_ELEMENTS or array.dtype == np.int64
            self._constants[tensor.name] = array if is_small else self._moved(array)
        self._nodes = [
            (node, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute})
            for node in graph.node
        ]
        self._scalars: dict[Any, Tensor] = {}

    @torch.inference_mode()
    def run(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        """Map inputs to outputs, all on the device."""
        values: dict[str, Value] = {**self._constants, **feeds}
        for node, attributes in self._nodes:
            given = [values[name] if name else None for name in node.input]
            found = self._node(node, attributes, given)
            values.update(zip(node.output, found, strict=False))
        return {name: self._on_device(values[name]) for name in self._outputs}

    def _node(self, node: Any, a: dict[str, Any], given: list[Value]) -> Sequence[Value]:
        kind = node.op_type
        if kind == "Shape":
            return (np.array(tuple(given[0].shape), np.int64)[a.get("start", 0) : a.get("end")],)
        if kind == "DtMoE":
            return self._run_moe(a, [self._on_device(value).contiguous() for value in given])
        is_host = all(value is None or isinstance(value, np.ndarray) for value in given)
        if kind == "Range":
            return (np.arange(*(value.item() for value in given), dtype=given[0].dtype),)
        if is_host:
            tensors = [None if v is None else torch.from_numpy(np.array(v)) for v in given]
            found = self._compute(kind, a, tensors, len(node.output))
            return [value.numpy() for value in found]
        return self._compute(kind, a, given, len(node.output))

    def _compute(
        self, kind: str, a: dict[str, Any], given: list[Value], count: int
    ) -> list[Tensor]:
        found = _KINDS[kind](self, a, given, count)
        return list(found) if isinstance(found, (tuple, list)) else [found]

    def _on_device(self, value: Value) -> Any:
        """Return a value as a tensor; a host value is moved once."""
        if not isinstance(value, np.ndarray):
            return value
        key = (value.tobytes(), value.dtype.str, value.shape)
        if key not in self._scalars:
            self._scalars[key] = self._moved(value)
        return self._scalars[key]

    def _moved(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)


def at(address: int, shape: Sequence[int], dtype: np.dtype[Any], device: str) -> Tensor:
    """View memory of another owner as a tensor."""
    if device == "cpu":
        size = int(np.prod(shape)) * dtype.itemsize
        memory = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
        return torch.from_numpy(np.frombuffer(memory, dtype).reshape(tuple(shape)))
    interface = {
        "shape": tuple(shape),
        "typestr": dtype.str,
        "data": (address, False),
        "version": 3,
    }
    face = type("Memory", (), {"__cuda_array_interface__": interface})()
    return torch.as_tensor(face, device=device)


def torch_dtype(element: int) -> torch.dtype:
    """Torch's type for ONNX's number of a type."""
    name = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element)).name
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _ints(value: Value) -> list[int]:
    return [int(item) for item in np.asarray(value).reshape(-1)]


def _elementwise(operation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
        return operation(*(program._on_device(value) for value in given))

    return run


def _divided(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="floor")


def _gelu(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    return F.gelu(given[0], approximate=a.get("approximate", b"none").decode())


def _softmax(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    return torch.softmax(given[0], a.get("axis", -1))


def _gemm(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    x, y, *rest = (program._on_device(value) for value in given)
    product: Tensor = (x.T if a.get("transA") else x) @ (y.T if a.get("transB") else y)
    return product + rest[0] if rest else product


def _transpose(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    return given[0].permute(*a["perm"]) if "perm" in a else given[0].T  # type: ignore[no-any-return]


def _reshape(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    x, sizes = given[0], _ints(given[1])
    kept = [
        x.shape[i] if size == 0 and not a.get("allowzero") else size for i, size in enumerate(sizes)
    ]
    return x.reshape(kept)  # type: ignore[no-any-return]


def _flatten(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    x = given[0]
    return x.reshape(int(np.prod(x.shape[: a.get("axis", 1)])), -1)  # type: ignore[no-any-return]


def _squeeze(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    x = given[0]
    axes = _ints(given[1]) if len(given) > 1 else [i for i, d in enumerate(x.shape) if d == 1]
    return x.squeeze(tuple(axes))  # type: ignore[no-any-return]


def _unsqueeze(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    x = given[0]
    for axis in sorted(_ints(given[1])):
        x = x.unsqueeze(axis)
    return x  # type: ignore[no-any-return]


def _concat(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    return torch.cat([program._on_device(value) for value in given], a["axis"])


def _expand(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    x = program._on_device(given[0])
    shape = np.broadcast_shapes(tuple(x.shape), tuple(_ints(given[1])))
    return torch.broadcast_to(x, shape)


def _slice(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    x, begins, ends, *rest = given
    axes = _ints(rest[0]) if rest else list(range(len(_ints(begins))))
    steps = _ints(rest[1]) if len(rest) > 1 else [1] * len(axes)
    for axis, begin, end, step in zip(axes, _ints(begins), _ints(ends), steps, strict=True):
        first, last, _ = slice(begin, end, step).indices(x.shape[axis])
        index: list[slice] = [slice(None)] * x.dim()
        index[axis] = slice(first, max(last, first), step)
        x = x[tuple(index)]
    return x  # type: ignore[no-any-return]


def _gather(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    x, axis = program._on_device(given[0]), a.get("axis", 0)
    if isinstance(given[1], np.ndarray) and given[1].ndim == 0:
        return x.select(axis, int(given[1]))  # type: ignore[no-any-return]
    ids = program._on_device(given[1])
    found = x.index_select(axis, ids.reshape(-1).long())
    return found.reshape(*x.shape[:axis], *ids.shape, *x.shape[axis + 1 :])  # type: ignore[no-any-return]


def _mean(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    return given[0].mean(tuple(_ints(given[1])), keepdim=bool(a.get("keepdims", 1)))  # type: ignore[no-any-return]


def _sum(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    x = given[0]
    axes = _ints(given[1]) if len(given) > 1 else list(range(x.dim()))
    return x.sum(tuple(axes), keepdim=bool(a.get("keepdims", 1)), dtype=x.dtype)  # type: ignore[no-any-return]


def _layer_norm(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    x, *rest = (program._on_device(value) for value in given)
    shape = x.shape[a.get("axis", -1) :]
    weight, bias = (*rest, None)[:2]
    return F.layer_norm(x, shape, weight, bias, a.get("epsilon", 1e-5))


def _cast(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    return given[0].to(torch_dtype(a["to"]))  # type: ignore[no-any-return]


def _cast_like(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    return program._on_device(given[0]).to(given[1].dtype)  # type: ignore[no-any-return]


def _split(program: TorchProgram, a: Any, given: list[Value], count: int) -> Sequence[Tensor]:
    x, axis = given[0], a.get("axis", 0)
    sizes = _ints(given[1]) if len(given) > 1 else x.shape[axis] // count
    return x.split(sizes, axis)  # type: ignore[no-any-return]


def _top_k(program: TorchProgram, a: Any, given: list[Value], count: int) -> Sequence[Tensor]:
    """Top-k with ONNX's order of ties: the lower index first."""
    size = _ints(given[1])[0]
    values, ids = torch.sort(given[0], dim=a.get("axis", -1), descending=True, stable=True)
    return values[..., :size], ids[..., :size]


def _conv(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    x, weight, *bias = (program._on_device(value) for value in given)
    rank = weight.dim() - 2
    pads = list(a.get("pads", [0] * 2 * rank))
    pairs = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank])]
    convolve = F.conv1d if rank == 1 else F.conv2d
    return convolve(
        F.pad(x, pairs),
        weight,
        bias[0] if bias else None,
        tuple(a.get("strides", [1] * rank)),
        0,
        tuple(a.get("dilations", [1] * rank)),
        a.get("group", 1),
    )


def _conv_transpose(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    x, weight, *bias = (program._on_device(value) for value in given)
    pads = a.get("pads", [0, 0])
    out = F.conv_transpose1d(
        x,
        weight,
        bias[0] if bias else None,
        tuple(a.get("strides", [1])),
        0,
        0,
        a.get("group", 1),
        tuple(a.get("dilations", [1])),
    )
    return out[..., pads[0] : out.shape[-1] - pads[1]]


def _dequantise(program: TorchProgram, a: Any, given: list[Value], count: int) -> Tensor:
    """Dequantise with one scale for each index of `axis`."""
    x, scale, *_ = (program._on_device(value) for value in given)
    shape = [1] * x.dim()
    shape[a.get("axis", 1)] = -1
    return x.to(scale.dtype) * scale.reshape(shape)  # type: ignore[no-any-return]


_KINDS: dict[str, Callable[..., Any]] = {
    "Add": _elementwise(torch.add),
    "Sub": _elementwise(torch.sub),
    "Mul": _elementwise(torch.mul),
    "Div": _elementwise(_divided),
    "And": _elementwise(torch.logical_and),
    "Less": _elementwise(torch.lt),
    "GreaterOrEqual": _elementwise(torch.ge),
    "Max": _elementwise(torch.maximum),
    "Min": _elementwise(torch.minimum),
    "Where": _elementwise(torch.where),
    "Sqrt": _elementwise(torch.sqrt),
    "Sin": _elementwise(torch.sin),
    "Tanh": _elementwise(torch.tanh),
    "Floor": _elementwise(torch.floor),
    "Sigmoid": _elementwise(torch.sigmoid),
    "MatMul": _elementwise(torch.matmul),
    "Gelu": _gelu,
    "Softmax": _softmax,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Expand": _expand,
    "Slice": _slice,
    "Gather": _gather,
    "ReduceMean": _mean,
    "ReduceSum": _sum,
    "LayerNormalization": _layer_norm,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Split": _split,
    "TopK": _top_k,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "DequantizeLinear": _dequantise,
}
