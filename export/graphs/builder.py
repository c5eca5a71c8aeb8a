"""A small layer over `onnx.helper`: name values, stream weights to disk, check the result.

Values are the names of ONNX values. A weight goes to its file the moment it is given and is
forgotten, so an exporter holds one tensor at a time; onnxscript would keep them all to the end.

Weights are stored in the graph's precision. ONNX Runtime's graphs are float32 throughout; engines
take float16, with `exact` around what must stay float32: norms, the router, softmax, residuals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from deeptalk_edge.errors import ArtifactError

OPSET = 23
DOMAIN = "deeptalk"
"""Of the nodes that are ours: the TensorRT plugin's."""
IR_VERSION = 11

FLOAT = TensorProto.FLOAT
FLOAT16 = TensorProto.FLOAT16
INT32 = TensorProto.INT32
INT64 = TensorProto.INT64
BOOL = TensorProto.BOOL

_PAGE_BYTES = 4096
_INLINE_BYTES = 1024  # smaller constants stay in the graph, where shape inference can read them

Array = NDArray[Any]
Dim = int | str
Precision = Literal["float32", "float16"]
Typed = tuple[int, Sequence[Dim]]
"""Element type and shape of a value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where an array lies in a weight file."""

    file_name: str
    offset: int
    num_bytes: int
    shape: tuple[int, ...]
    data_type: int


class WeightFile:
    """One file of external data, appended to; every array begins on a page, so it can be mapped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, array: Array) -> StoredTensor:
        """Write an array and fill its last page with zeros."""
        data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        if data_type == TensorProto.INT4:  # numpy gives each a byte, a file half of one
            content = memoryview(numpy_helper.from_array(array).raw_data)
        else:
            content = np.ascontiguousarray(array).data
        offset = self._file.tell()
        self._file.write(content)
        self._file.write(bytes(-content.nbytes % _PAGE_BYTES))
        return StoredTensor(
            file_name=self._path.name,
            offset=offset,
            num_bytes=content.nbytes,
            shape=array.shape,
            data_type=data_type,
        )


class Nodes:
    """Nodes and small constants in the making; every value's name begins with `prefix`."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: list[TensorProto] = []
        self._prefix = prefix
        self._shared: dict[tuple[bytes, str, tuple[int, ...]], str] = {}
        self._num_values = 0

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one output; an absent optional input is ""."""
        return self.ops(kind, *inputs, num_outputs=1, name=name, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, num_outputs: int, name: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs."""
        stem = self._fresh(name or kind.lower())
        outputs = [stem] if num_outputs == 1 else [f"{stem}.{i}" for i in range(num_outputs)]
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=stem, **attributes))
        return outputs

    def split(self, value: str, sizes: Sequence[int], *, axis: int = -1) -> list[str]:
        """Cut a value along an axis into pieces of known sizes."""
        return self.ops("Split", value, self.ints(*sizes), num_outputs=len(sizes), axis=axis)

    def reshape(self, value: str, *shape: int) -> str:
        """0 keeps the dimension that the input has there, -1 takes what is left."""
        return self.op("Reshape", value, self.ints(*shape))

    def ints(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """A constant float32 scalar."""
        return self.constant(np.array(value, np.float32))

    def constant(self, array: Array) -> str:
        """A small constant, kept in the graph; equal ones are stored once."""
        key = (array.tobytes(), array.dtype.str, array.shape)
        if key not in self._shared:
            self._shared[key] = name = self._fresh("constant")
            self.initialisers.append(numpy_helper.from_array(array, name))
        return self._shared[key]

    def _fresh(self, stem: str) -> str:
        self._num_values += 1
        return f"{self._prefix}{stem}_{self._num_values}"


class Graph(Nodes):
    """One ONNX graph in the making, saved to `<name>.onnx` when its block ends well."""

    def __init__(self, directory: Path, name: str, *, precision: Precision = "float32") -> None:
        super().__init__()
        self.precision: Precision = precision
        self.float_type = FLOAT if precision == "float32" else FLOAT16
        self._directory = directory
        self._name = name
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._known: list[onnx.ValueInfoProto] = []
        self._weights: WeightFile | None = None
        self._stack = ExitStack()
        self._renamed: dict[str, str] = {}
        self._given: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Graph:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()
        if kind is None:
            self._save()

    def input(self, name: str, data_type: int, shape: Sequence[Dim]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, data_type, shape))
        return name

    def output(
        self, value: str, name: str, shape: Sequence[Dim], *, data_type: int = FLOAT
    ) -> None:
        """Give a value out under another name."""
        self._outputs.append(helper.make_tensor_value_info(name, data_type, shape))
        self.rename(value, name)

    def rename(self, value: str, name: str) -> None:
        """Let the saved graph call a value so; until then it keeps its old name."""
        self._renamed[value] = name

    def half(self, value: str) -> str:
        """A float32 value in the graph's precision."""
        return value if self.precision == "float32" else self.op("Cast", value, to=self.float_type)

    def exact(self, value: str) -> str:
        """A value of the graph's precision in float32."""
        return value if self.precision == "float32" else self.op("Cast", value, to=FLOAT)

    def node(
        self, kind: str, inputs: Sequence[str], outputs: Mapping[str, Typed], **attributes: Any
    ) -> None:
        """Add a node of our own domain; shape inference must be told its outputs."""
        self.nodes.append(
            helper.make_node(
                kind, inputs, list(outputs), name=self._fresh(kind), domain=DOMAIN, **attributes
            )
        )
        self._known += [helper.make_tensor_value_info(v, *typed) for v, typed in outputs.items()]

    def weight(self, name: str, array: Array, *, precision: Precision | None = None) -> str:
        """A weight, in the graph's precision if not in another, written to `<graph>.bin` at once.

        Raises ArtifactError if it is beyond that precision.
        """
        return self.array(name, in_precision(name, array, precision or self.precision))

    def given(self, name: str, array: Array) -> str:
        """A weight that stays an input of the graph, bound by its caller.

        What is to be bound is in `<graph>.bin` where `<graph>.weights.json` says: name to
        offset, shape and dtype. Raises ArtifactError if it is beyond the graph's precision.
        """
        stored = self._file().append(in_precision(name, array, self.precision))
        self._given[name] = {
            "offset": stored.offset,
            "shape": list(stored.shape),
            "dtype": self.precision,
        }
        return self.input(name, self.float_type, stored.shape)

    def array(self, name: str, array: Array) -> str:
        """A constant of any type; beyond 1 KiB it goes to `<graph>.bin` at once."""
        if array.nbytes < _INLINE_BYTES:
            self.initialisers.append(numpy_helper.from_array(array, name))
            return name
        return self.stored(name, self._file().append(array))

    def stored(self, name: str, stored: StoredTensor) -> str:
        """A weight that lies in a file already."""
        tensor = TensorProto(name=name, data_type=stored.data_type, dims=stored.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", stored.file_name),
            ("offset", str(stored.offset)),
            ("length", str(stored.num_bytes)),
        ):
            tensor.external_data.add(key=key, value=value)
        self.initialisers.append(tensor)
        return name

    def _file(self) -> WeightFile:
        if self._weights is None:
            self._weights = WeightFile(self._directory / f"{self._name}.bin")
            self._stack.enter_context(self._weights)
        return self._weights

    def _save(self) -> None:
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [self._renamed.get(value, value) for value in names]
        graph = helper.make_graph(
            self.nodes, self._name, self._inputs, self._outputs, self.initialisers
        )
        graph.value_info.extend(self._known)
        if self._given:
            place = self._directory / f"{self._name}.weights.json"
            place.write_text(json.dumps(self._given, indent=1) + "\n", encoding="utf-8")
        save(graph, self._directory / f"{self._name}.onnx")


def in_precision(name: str, array: Array, precision: Precision) -> Array:
    """A weight as it is stored.

    Raises ArtifactError if it is not finite there.
    """
    with np.errstate(over="ignore"):  # said below, with the weight's name
        stored = np.asarray(array, precision)
    if not np.isfinite(stored).all():
        raise ArtifactError(
            f"{name}: weights up to {np.abs(array).max():.4g}, expected finite ones within "
            f"{precision}; export in float32, or check the checkpoint"
        )
    return stored


def save(graph: onnx.GraphProto, path: Path) -> None:
    """Write a graph and have onnx's checker read it back, shape inference included."""
    domains = {node.domain for node in graph.node} - {""}
    opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
