"""A class of more than 12 public methods or 10 fields holds two nouns, unless a reason is given."""

from __future__ import annotations

import ast
import subprocess
from functools import cache
from typing import NamedTuple

import pytest

from tests.places import ROOT

MOST_METHODS, MOST_FIELDS = 12, 10


class Allowed(NamedTuple):
    """How large a class may be, and why."""

    methods: int
    fields: int
    reason: str


_BUFFERS = "every field is a buffer or a count that the frame path must not allocate"
_DRIVER = "one method a call of the driver"
_ENGINE = "an engine keeps its graphs, buffers and cache; each is used by one method"

ALLOWED = {
    # Protocols and similar: as many methods as the thing they describe.
    "Engine": Allowed(13, 0, "the protocol of a language model in a conversation"),
    "TapedEngine": Allowed(13, 4, "passes on every call of Engine"),
    "CudaRuntime": Allowed(14, 0, _DRIVER),
    "Cudart": Allowed(29, 1, _DRIVER),
    "_Collector": Allowed(22, 3, "one visitor method for each kind of AST node"),
    # Hot paths: buffers that are allocated before the first frame.
    "PlayQueue": Allowed(8, 12, _BUFFERS),
    "InputStream": Allowed(5, 12, _BUFFERS),
    "OutputStream": Allowed(3, 16, _BUFFERS),
    "VirtualPort": Allowed(8, 14, _BUFFERS),
    "Playback": Allowed(7, 12, _BUFFERS),
    "DeviceCache": Allowed(9, 12, _BUFFERS),
    "PassOutputs": Allowed(3, 12, _BUFFERS),
    "CopiedPool": Allowed(7, 12, _BUFFERS),
    "CpuEngine": Allowed(3, 18, _ENGINE),
    "OrtEngine": Allowed(3, 13, _ENGINE),
    "TensorrtEngine": Allowed(4, 20, _ENGINE),
    "TensorrtEncoder": Allowed(2, 11, _ENGINE),
    "GpuDevice": Allowed(9, 11, "the libraries, the GPU's facts and a stream, opened together"),
    # Writers of graphs: one field a tensor or a shape.
    "Graph": Allowed(10, 11, "a graph under construction: one field for each kind of its parts"),
    "_Codec": Allowed(2, 14, "one field for each shape of the codec's graph"),
    "_Step": Allowed(4, 17, "one field for each shape of the step's graph"),
    "_Export": Allowed(1, 14, "one export's inputs, each used by several of its files"),
    # Benches.
    "CpuDecoder": Allowed(5, 11, "a decoder of random weights keeps what its kernels point to"),
    "_RandomWeights": Allowed(0, 11, "one field for each part of a decoder"),
    "Soak": Allowed(1, 13, "counts everything that a soak reports"),
    # Owners of a conversation's parts.
    "Conversation": Allowed(12, 14, "puts the parts together; each is opened once and closed once"),
    "LiveConversation": Allowed(8, 14, "three threads and what they wake each other with"),
    "ModelWorker": Allowed(3, 11, "the answer at hand and the two ends of its queue"),
    "Answer": Allowed(9, 14, "each of its steps keeps what the later ones and its end need"),
    "VoiceLoop": Allowed(9, 12, "the machine, its two queues, and the parts that it drives"),
    "Decoding": Allowed(5, 19, "rows until done, with the parts that each row passes through"),
    # Paging.
    "ExpertPager": Allowed(13, 13, "puts the parts together; each call is one part's"),
    "RecordReader": Allowed(8, 19, "two queues and the threads that share them"),
    "Residency": Allowed(9, 16, "every decision under one lock, and its counts"),
}


def _is_table(node: ast.ClassDef) -> bool:
    """A dataclass has as many fields as its subject has facts."""
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _num_methods(node: ast.ClassDef) -> int:
    return sum(
        isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and not part.name.startswith("_")
        for part in node.body
    )


def _num_fields(node: ast.ClassDef) -> int:
    declared = {
        part.target.id
        for part in node.body
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
    assigned = {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name)
        and part.value.id == "self"
    }
    return len(declared | assigned)


@cache
def sizes() -> dict[str, tuple[int, int]]:
    """Public methods and fields of every class outside of tests that is not a dataclass; of classes
    with equal names the largest counts."""
    command = ["git", "-C", str(ROOT), "ls-files", "--", "*.py", ":!tests"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    found: dict[str, tuple[int, int]] = {}
    for name in filter(None, listed):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not _is_table(node):
                methods, fields = found.get(node.name, (0, 0))
                found[node.name] = (
                    max(methods, _num_methods(node)),
                    max(fields, _num_fields(node)),
                )
    return found


def test_a_class_holds_one_noun() -> None:
    wrong = []
    for name, (methods, fields) in sizes().items():
        most = ALLOWED.get(name, Allowed(MOST_METHODS, MOST_FIELDS, ""))
        if methods > max(most.methods, MOST_METHODS) or fields > max(most.fields, MOST_FIELDS):
            wrong.append(f"{name}: {methods} public methods, {fields} fields; split it by noun")
    assert not wrong


@pytest.mark.parametrize("name", ALLOWED)
def test_every_allowance_is_needed_and_as_small_as_its_class(name: str) -> None:
    methods, fields = sizes()[name]
    assert methods > MOST_METHODS or fields > MOST_FIELDS, "take it off the list"
    assert ALLOWED[name][:2] == (methods, fields), "a class that shrank stays small"
    assert ALLOWED[name].reason
