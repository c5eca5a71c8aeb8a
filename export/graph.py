"""A small layer over `onnx.helper`: name values, stream weights to disk, check the result.

Values are the names of ONNX values. A weight goes to its file the moment it is given and is
forgotten, so an exporter holds one tensor at a time; onnxscript would keep them all to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 23
IR_VERSION = 11

FLOAT = TensorProto.FLOAT
INT64 = TensorProto.INT64
BOOL = TensorProto.BOOL

_PAGE_BYTES = 4096
_INLINE_BYTES = 1024  # smaller constants stay in the graph, where shape inference can read them

Array = NDArray[Any]
Dim = int | str


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
        contiguous = np.ascontiguousarray(array)
        offset = self._file.tell()
        self._file.write(contiguous.data)
        self._file.write(bytes(-contiguous.nbytes % _PAGE_BYTES))
        return StoredTensor(
            file_name=self._path.name,
            offset=offset,
            num_bytes=contiguous.nbytes,
            shape=contiguous.shape,
            data_type=helper.np_dtype_to_tensor_dtype(contiguous.dtype),
        )


class Graph:
    """One ONNX graph in the making, saved to `<name>.onnx` when its block ends well."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initialisers: list[TensorProto] = []
        self._weights: WeightFile | None = None
        self._stack = ExitStack()
        self._shared: dict[tuple[bytes, str, tuple[int, ...]], str] = {}
        self._renamed: dict[str, str] = {}
        self._num_values = 0

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
        """Give a value out under a name of its own."""
        self._outputs.append(helper.make_tensor_value_info(name, data_type, shape))
        self._renamed[value] = name

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node with one output; an absent optional input is ""."""
        return self.ops(kind, *inputs, num_outputs=1, name=name, **attributes)[0]

    def ops(
        self, kind: str, *inputs: str, num_outputs: int, name: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs."""
        stem = self._fresh(name or kind.lower())
        outputs = [stem] if num_outputs == 1 else [f"{stem}.{i}" for i in range(num_outputs)]
        self._nodes.append(helper.make_node(kind, inputs, outputs, name=stem, **attributes))
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
            self._initialisers.append(numpy_helper.from_array(array, name))
        return self._shared[key]

    def weight(self, name: str, array: Array) -> str:
        """A weight as float32, written to `<name of the graph>.bin` at once."""
        array = np.asarray(array, np.float32)
        if array.nbytes < _INLINE_BYTES:
            self._initialisers.append(numpy_helper.from_array(array, name))
            return name
        if self._weights is None:
            self._weights = WeightFile(self._directory / f"{self._name}.bin")
            self._stack.enter_context(self._weights)
        return self.stored(name, self._weights.append(array))

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
        self._initialisers.append(tensor)
        return name

    def _fresh(self, stem: str) -> str:
        self._num_values += 1
        return f"{stem}_{self._num_values}"

    def _save(self) -> None:
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [self._renamed.get(value, value) for value in names]
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, self._initialisers
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
        )
        path = self._directory / f"{self._name}.onnx"
        path.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(path), full_check=True)
