"""Data that engines read besides the rows: embedding tables, weights that are inputs, experts.

experts   all are resident, in ascending layer and expert, the order of experts.bin. Each layer is
          bound to its part of the one arena, so every slot table is 0, 1, 2 ...
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.runtime.backends.tensorrt.device import GpuDevice, check_records
from deeptalk_edge.runtime.backends.tensorrt.engine_file import LoadedEngine, bundle_file
from deeptalk_edge.schema import read_json

EMBEDDING, HEAD = "embedding.bin", "head.bin"


def bind_tables(device: GpuDevice, bundle: Bundle, embed: LoadedEngine, head: LoadedEngine) -> None:
    """Bind the embedding table (V, C) and the head's, as one buffer if the head is tied.

    Raises ArtifactError if a file does not match its engine's input.
    """
    tables: dict[str, int] = {}
    of_head = EMBEDDING if bundle.manifest.model.tied_head else HEAD
    for engine, name in ((embed, EMBEDDING), (head, of_head)):
        if "table" not in engine.inputs:  # the engine holds its weights as constants
            continue
        if name not in tables:
            path = bundle_file(bundle, name)
            tables[name] = device.load_file(path, num_bytes=engine.num_bytes("table"))
        engine.bind("table", tables[name], engine.shape("table"))


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of a weight in its file."""

    offset: int
    shape: tuple[int, ...]


def bind_weights(device: GpuDevice, bundle: Bundle, step: LoadedEngine) -> None:
    """Bind the dense weights that are inputs of the step, if there are any.

    Raises ArtifactError if the file does not match the engine's inputs.
    """
    entry = bundle.manifest.engines["step"]
    if entry.weights is None:
        return
    path = bundle_file(bundle, entry.weights)
    places = _read_places(bundle_file(bundle, entry.weight_places))
    ends = [place.offset + step.num_bytes(name) for name, place in places.items()]
    pointer = device.load_file(path, num_bytes=max(ends))
    for name, place in places.items():
        if place.shape != step.shape(name):
            raise ArtifactError(
                f"{path}: {name} is {place.shape}, the engine reads {step.shape(name)}; export "
                "the bundle again"
            )
        step.bind(name, pointer + place.offset, place.shape)


def _read_places(path: Path) -> dict[str, _Place]:
    try:
        return {
            str(name): _Place(int(place["offset"]), tuple(int(d) for d in place["shape"]))
            for name, place in read_json(path).items()
            if int(place["offset"]) >= 0
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}: not a list of weights ({error!r}); export the bundle again"
        ) from error


def bind_experts(device: GpuDevice, bundle: Bundle, step: LoadedEngine, stream: int) -> None:
    """Load every expert, and bind the slot tables and arenas.

    Raises DoesNotFit if the device has no memory for all, ExpertUnavailable naming a damaged one.
    """
    manifest = bundle.manifest
    decoder, record_bytes = manifest.model.decoder, manifest.record_format.record_bytes
    records = manifest.experts.records
    first = min(record.offset for record in records)
    slots = {(r.layer, r.expert): (r.offset - first) // record_bytes for r in records}
    path = bundle.file(manifest.experts.file)
    num_bytes = manifest.files[path.name].bytes
    arena = device.load_file(path, num_bytes=num_bytes, check=check_records(bundle))
    table = device.pinned(4 * decoder.num_experts)
    for layer in decoder.moe_layers:
        # The records of a layer are contiguous: its arena begins with the first.
        base = min(slots[layer, expert] for expert in range(decoder.num_experts))
        places = [slots[layer, expert] - base for expert in range(decoder.num_experts)]
        num_slots = max(places) + 1
        table.view(np.int32, (decoder.num_experts,))[:] = places
        on_device = device.malloc(4 * decoder.num_experts)
        device.cuda.copy_to_device(on_device, table.address, 4 * decoder.num_experts, stream)
        device.cuda.synchronize(stream)
        step.bind(f"slot_table_{layer}", on_device)
        pointer = arena + first + base * record_bytes
        arenas = [name for name in step.inputs if name.partition(".")[0] == f"slot_arena_{layer}"]
        for name in arenas:
            shape = (num_slots, *step.shape(name)[1:])
            item = int(np.prod(shape[1:])) * step.dtype(name).itemsize
            if item != record_bytes:
                raise ArtifactError(
                    f"{step.path}: {name} has records of {item} bytes, {path.name} has "
                    f"{record_bytes}; export the bundle again"
                )
            step.bind(name, pointer, shape)
