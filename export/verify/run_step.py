"""Runs a step in its no-plugin form through ONNX Runtime, as an engine is run: for checks.

Caches are allocated once and the new rows appended to those that count; an arena holds the
experts of one layer and is bound under the name of each of its arrays. At export the step runs
piece by piece, with one layer's experts mapped, so that its memory does not follow the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import PAGE_BYTES
from deeptalk_edge.bundle.manifest import Manifest
from deeptalk_edge.errors import DoesNotFit
from deeptalk_edge.export.graphs.builder import Array
from deeptalk_edge.export.graphs.decoder import EMBEDDING_FILE, head_file
from deeptalk_edge.export.verify.golden import GoldenInputs, GraphRunner, plain_session, run_golden
from deeptalk_edge.export.verify.step_pieces import step_pieces
from deeptalk_edge.schema import read_json

_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}

_ROWS_AT_ONCE = 2
"""In a prefill: rows that see one another, yet their experts in float32 are no more than a GB."""


@dataclass(frozen=True, slots=True)
class Arena:
    """The resident experts of one layer."""

    records: NDArray[np.uint8]
    """Packed records, (S, record_bytes)."""

    slot_table: NDArray[np.int32]
    """(E): where an expert's record is, -1 where it is not resident."""

    def view(self, dtype: type[np.generic]) -> Array:
        """The records as the no-plugin form takes them, (S, pages, page)."""
        pages = self.records.view(dtype)
        return pages.reshape(len(pages), -1, PAGE_BYTES // pages.itemsize)


class StepRunner:
    """One conversation. Not thread-safe."""

    def __init__(
        self,
        path: Path,
        arenas: Mapping[int, Arena],
        *,
        capacity: int,
        num_items: int = 1,
        piece: onnx.ModelProto | None = None,
    ) -> None:
        """The step at `path`, or this piece of it (step_pieces.py); `num_items` where its graph
        leaves B open."""
        graph = path if piece is None else piece.SerializeToString()
        self._session = plain_session(graph, path.parent)
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._capacity = capacity
        self._layers: list[int] = []
        self._feeds: dict[str, Array] = {}
        given = _given_weights(path.parent, self._session.get_modelmeta().graph_name)
        for value in self._session.get_inputs():
            kind, _, layer = value.name.partition(".")[0].rpartition("_")
            if value.name in given:
                self._feeds[value.name] = given[value.name]
            elif value.name == "x":
                is_open = not isinstance(value.shape[0], int)
                self.num_items = num_items if is_open else int(value.shape[0])
                self._rows = value.shape[1] if isinstance(value.shape[1], int) else None
            elif kind in ("latent", "rope"):
                items = value.shape[0] if isinstance(value.shape[0], int) else num_items
                shape = (items, capacity, value.shape[2])
                self._feeds[value.name] = np.zeros(shape, _TYPES[value.type])
                if kind == "latent":
                    self._layers.append(int(layer))
            elif kind == "slot_table":
                self._feeds[value.name] = arenas[int(layer)].slot_table
            elif kind == "slot_arena":
                self._feeds[value.name] = arenas[int(layer)].view(_TYPES[value.type])
        self.num_rows = 0

    def run(self, x: Array, *, rows_at_once: int | None = None) -> dict[str, Array]:
        """Embedded rows (B, T, C) after those of earlier runs to the step's outputs.

        A step of fixed T, or one that is given less `rows_at_once`, runs as often as it takes.
        Raises DoesNotFit if the caches are full.
        """
        size = self._rows or rows_at_once or x.shape[1]
        steps = [self._step(x[:, i : i + size]) for i in range(0, x.shape[1], size)]
        return {
            "hidden": np.concatenate([step["hidden"] for step in steps], axis=1),
            "expert_ids": np.concatenate([step["expert_ids"] for step in steps], axis=2),
            "missing": np.sum([step["missing"] for step in steps], axis=0),
        }

    def _step(self, x: Array) -> dict[str, Array]:
        rows = slice(self.num_rows, self.num_rows + x.shape[1])
        if rows.stop > self._capacity:
            raise DoesNotFit(
                f"{rows.stop} rows, the caches hold {self._capacity}; make them larger"
            )
        positions = np.arange(rows.start, rows.stop, dtype=np.int32)
        feeds = {**self._feeds, "x": x, "positions": positions}
        found: Sequence[Any] = self._session.run(None, feeds)
        outputs = dict(zip(self._outputs, found, strict=True))
        for kind in ("latent", "rope"):
            for layer, new in zip(self._layers, outputs[f"new_{kind}s"], strict=True):
                self._feeds[f"{kind}_{layer}"][:, rows] = new
        self.num_rows = rows.stop
        return outputs


def _given_weights(directory: Path, graph: str) -> dict[str, Array]:
    """The dense weights that are inputs of a graph, mapped."""
    places = directory / f"{graph}.weights.json"
    if not places.is_file():
        return {}
    return {
        name: np.memmap(
            directory / f"{graph}.bin", place["dtype"], "r", place["offset"], tuple(place["shape"])
        )
        for name, place in read_json(places).items()
    }


def engine_outputs(
    graphs: Path, experts: Path, manifest: Manifest, inputs: GoldenInputs
) -> dict[str, NDArray[np.float32]]:
    """What engines built from the graphs in a directory ought to make of the golden inputs.

    It holds encoder.onnx, embed.onnx, step_native.onnx, head.onnx and codec.onnx.
    """

    table_of_head = head_file(manifest.model)

    def decode(feeds: Sequence[Mapping[str, Array]]) -> list[Array]:
        embed = _with_table(graphs, "embed", EMBEDDING_FILE)
        x = [embed(one)["x"] for one in feeds]
        del embed
        return _decode_in_pieces(graphs / "step_native.onnx", experts, manifest, x)

    return run_golden(
        inputs,
        manifest,
        open_graph=lambda name: _with_table(graphs, name, table_of_head),
        decode=decode,
    )


def _decode_in_pieces(
    step: Path, experts: Path, manifest: Manifest, x: Sequence[Array]
) -> list[Array]:
    """Embedded rows (1, T, C), each after those before, to their hidden states (1, T, C).

    Layer after layer: all rows go through one piece before the next is opened.
    """
    capacity = sum(one.shape[1] for one in x)
    for piece, layer in zip(step_pieces(step), manifest.model.decoder.moe_layers, strict=True):
        arena = layer_arena(experts, manifest, layer)
        runner = StepRunner(step, {layer: arena}, capacity=capacity, piece=piece)
        x = [np.repeat(one, runner.num_items // len(one), axis=0) for one in x]
        x = [runner.run(one, rows_at_once=_ROWS_AT_ONCE)["hidden"] for one in x]
        del runner, arena
    return [one[:1] for one in x]


def layer_arena(experts: Path, manifest: Manifest, layer: int) -> Arena:
    """The experts of a layer as they lie in experts.bin, mapped: each in a slot."""
    size = manifest.record_format_of(layer).record_bytes
    offsets = {
        record.expert: record.offset for record in manifest.experts.records if record.layer == layer
    }
    first = min(offsets.values())
    mapped = np.memmap(experts, np.uint8, "r", first, (len(offsets), size))
    slots = [(offsets[expert] - first) // size for expert in range(len(offsets))]
    return Arena(mapped, np.array(slots, np.int32))


def _with_table(graphs: Path, name: str, table_file: str) -> GraphRunner:
    """A graph, given this table if it has one as an input: embed and head have."""
    path = graphs / f"{name}.onnx"
    for value in onnx.load(str(path), load_external_data=False).graph.input:
        if value.name == "table":
            tensor = value.type.tensor_type
            shape = tuple(dim.dim_value for dim in tensor.shape.dim)
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            table = np.memmap(graphs / table_file, dtype, "r", shape=shape)
            return GraphRunner(path, {"table": table})
    return GraphRunner(path)
