"""Reads a TensorRT-RTX plan as the text that it holds: what will run, on what, with which memory.

TensorRT's own inspector needs a GPU, this needs none. A plan has one graph for each profile, and
each graph a `header` (targets, memory regions), `descriptors` (tensors) and `main` (operations):

    region = { name=devmem_0 size=8192000 ... }
    tensor={ ... dims={ "T" 2048 } ... name="x" ... region="devmem_0" ... type=half }
    function={ name=__myl_GathCast ... args={ "x" "y" } ... output_args={ "y" } ... }

The format is undocumented and belongs to a version: this was written for 1.7, and refuses a plan in
which it finds no graph, tensor or operation.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deeptalk_edge.errors import ArtifactError

_BEGIN = b"header {"
_INNER = ("*",)  # the target of what runs inside one kernel of another graph
_BOOKKEEPING = ("shape_call", "allocate", "deallocate")
_REGION = re.compile(r"^ +region = \{ name=(\S+) size=(\d+) ", re.MULTILINE)
_TENSOR = re.compile(
    r"^ +tensor=\{.*? dims=\{([^}]*)\}.* name=\"([^\"]*)\".* region=\"?([^\" ]*)\"? .*type=(\w+)",
    re.MULTILINE,
)
_TARGETS = re.compile(r"accelerators=\{([^}]*)\}")
_OPERATION = re.compile(r"^ +(\w+)=\{ name=(?:\"([^\"]*)\"|(\S+))(.*)", re.MULTILINE)
_ONLY_MOVES = re.compile(r"__myl_(Move|Resh|Tran|Cast|Slic|Conc|Repl|Gath)+(Etc)?|copy.*")
_WORKSPACE = re.compile(r"^__scratch_space|_wksp(\.|$)")
_QUOTED = re.compile(r"\"([^\"]*)\"")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTensor:
    """One tensor of a graph."""

    name: str
    dims: tuple[int | str, ...]
    """A free dimension has a name."""
    region: str
    """Empty for the graph's own inputs and outputs."""
    dtype: str

    @property
    def least_elements(self) -> int:
        """Elements if every free dimension is 1."""
        return math.prod(dim for dim in self.dims if isinstance(dim, int))

    @property
    def is_temporary(self) -> bool:
        """A value between two operations; not the workspace of one, which `scratch_bytes` has."""
        return self.region.startswith("devmem") and not _WORKSPACE.search(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOperation:
    """One kernel, library call, plugin or copy."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineGraph:
    """What one profile of an engine runs."""

    targets: tuple[str, ...]
    """Compute capabilities, "sm_89" say; "sm_80" alone means every card from there on."""
    scratch_bytes: int
    tensors: tuple[EngineTensor, ...]
    operations: tuple[EngineOperation, ...]

    def temporaries_of(self, elements: int) -> list[EngineTensor]:
        """Temporaries of at least so many elements."""
        return [t for t in self.tensors if t.is_temporary and t.least_elements >= elements]

    def moves_of(self, elements: int) -> list[EngineOperation]:
        """Operations that only copy, relay or convert an input or constant of so many elements."""
        large = {
            tensor.name
            for tensor in self.tensors
            if not tensor.is_temporary and tensor.least_elements >= elements
        }
        return [
            operation
            for operation in self.operations
            if _ONLY_MOVES.fullmatch(operation.name) and large.intersection(operation.inputs)
        ]

    @property
    def fused_attentions(self) -> list[EngineOperation]:
        """Attention that runs as one kernel."""
        return [operation for operation in self.operations if "mha" in operation.name]

    @property
    def plugins(self) -> list[EngineOperation]:
        return [operation for operation in self.operations if operation.kind == "custom_layer"]


def read_plan(path: Path) -> list[EngineGraph]:
    """The graphs of a plan, in the order of its profiles.

    Raises ArtifactError if no graph, or one without tensors or operations, is found.
    """
    parsed = [_parse(text, path) for text in _texts(path)]
    graphs = [graph for graph in parsed if graph.targets != _INNER]
    if not graphs:
        raise ArtifactError(
            f"{path}: no graph found; plans of TensorRT-RTX 1.7 can be read, build it with that"
        )
    return graphs


def _texts(path: Path) -> Iterator[str]:
    """Every stretch of text from a header to the zero byte that ends it."""
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        begin = plan.find(_BEGIN)
        while begin >= 0:
            end = plan.find(b"\0", begin)
            yield plan[begin : end if end >= 0 else len(plan)].decode("utf-8", errors="replace")
            begin = plan.find(_BEGIN, end) if end >= 0 else -1


def _parse(text: str, path: Path) -> EngineGraph:
    targets = _TARGETS.search(text)
    _, _, body = text.partition("\nmain {")
    body, _, _ = body.partition("\nshape_main {")
    tensors = tuple(
        EngineTensor(name=name, dims=_dims(dims), region=region, dtype=dtype)
        for dims, name, region, dtype in _TENSOR.findall(text)
    )
    operations = tuple(
        _operation(kind, quoted or plain, rest)
        for kind, quoted, plain, rest in _OPERATION.findall(body)
        if kind not in _BOOKKEEPING
    )
    if not targets or not tensors or not operations:
        raise ArtifactError(
            f"{path}: {len(tensors)} tensors and {len(operations)} operations found in a graph; "
            "plans of TensorRT-RTX 1.7 can be read, build it with that"
        )
    regions = _REGION.findall(text)
    return EngineGraph(
        targets=tuple(name.replace("sm", "sm_") for name in targets[1].split()),
        scratch_bytes=sum(int(size) for name, size in regions if name.startswith("devmem")),
        tensors=tensors,
        operations=operations,
    )


def _dims(text: str) -> tuple[int | str, ...]:
    return tuple(int(dim) if dim.isdigit() else dim.strip('"') for dim in text.split())


def _operation(kind: str, name: str, rest: str) -> EngineOperation:
    """Kernels say `input_args` and `output_args`, everything else `input` and `output`."""
    fields = {
        key: tuple(_QUOTED.findall(values))
        for key, values in re.findall(r" (\w+)=\{([^}]*)\}", rest)
    }
    return EngineOperation(
        kind=kind,
        name=name,
        inputs=fields.get("input_args", fields.get("input", ())),
        outputs=fields.get("output_args", fields.get("output", ())),
    )
