"""`experts.bin`: one record per routed expert, in the order in which they are best kept together.

Layer by layer, audio experts first (they serve every spoken turn). What a record holds is
expert_record.py's; the weights are brought to its precision here, one expert at a time.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.bundle.expert_record import ExpertRecord, RecordFormat
from deeptalk_edge.calibration.quantise import quantise_expert
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import DecoderSpec
from deeptalk_edge.schema import Between, Items, checked, read_json, read_json_value

EXPERTS_FILE = "experts.bin"


def write_experts(
    checkpoint: Checkpoint,
    record_format: RecordFormat,
    audio_experts: Sequence[Sequence[int]],
    path: Path,
    layer_done: Callable[[int, list[ExpertRecord]], object],
    *,
    done: Sequence[ExpertRecord] = (),
) -> list[ExpertRecord]:
    """Write experts.bin; `audio_experts` holds one list of expert ids per MoE layer.

    `done` are records of whole layers, in the file's order, that an export before this one wrote;
    they stay if all of them are sound. `layer_done` is given each new layer and its records.

    Raises ArtifactError if a weight cannot be held in the records' precision.
    """
    spec = checkpoint.spec.decoder
    kept = list(done) if _are_sound(path, done) else []
    records = list(kept)
    with path.open("r+b" if kept else "wb") as file:
        file.truncate(len(kept) * record_format.record_bytes)
        file.seek(0, os.SEEK_END)
        for layer, audio in zip(spec.moe_layers, audio_experts, strict=True):
            if any(record.layer == layer for record in kept):
                continue
            for expert in expert_order(spec, audio):
                content = _packed(checkpoint, record_format, layer, expert)
                records.append(
                    ExpertRecord(
                        layer=layer,
                        expert=expert,
                        offset=file.tell(),
                        bytes=record_format.content_bytes,
                        crc32=zlib.crc32(content[: record_format.content_bytes].data),
                    )
                )
                file.write(content.data)
            file.flush()
            os.fsync(file.fileno())
            layer_done(layer, [record for record in records if record.layer == layer])
    return records


def _packed(
    checkpoint: Checkpoint, record_format: RecordFormat, layer: int, expert: int
) -> NDArray[np.uint8]:
    """One expert as a record."""
    name = f"model.layers.{layer}.mlp.experts.{expert}"
    gate, up, down = (
        checkpoint.tensor(f"{name}.{part}_proj.weight") for part in ("gate", "up", "down")
    )
    try:
        weights = quantise_expert(record_format, np.concatenate([gate, up]), down)
    except ValueError as error:
        raise ArtifactError(f"{name}: {error}") from error
    return record_format.pack(weights)


def _are_sound(path: Path, records: Sequence[ExpertRecord]) -> bool:
    """Every record is in the file as it was written."""
    if not records or not path.is_file():
        return False
    with path.open("rb") as file:
        for record in records:
            file.seek(record.offset)
            if zlib.crc32(file.read(record.bytes)) != record.crc32:
                return False
    return True


def expert_order(spec: DecoderSpec, audio: Sequence[int]) -> list[int]:
    """All experts of a layer, those of `audio` first, ascending in both parts."""
    return sorted(range(spec.num_experts), key=lambda expert: (expert not in audio, expert))


def read_audio_experts(checkpoint: Path, spec: DecoderSpec) -> list[list[int]]:
    """One list of audio experts per MoE layer; empty ones if the checkpoint does not name them.

    `audio_experts_file` may be a path on its authors' disk: a file of that name beside config.json
    serves too. Nothing but the order of the records hangs on it.

    Raises ArtifactError if the file does not fit the model.
    """
    named = read_json(checkpoint / "config.json").get("audio_experts_file")
    paths = [checkpoint / named, checkpoint / Path(named).name] if named else []
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return [[] for _ in spec.moe_layers]
    num_layers, last = len(spec.moe_layers), spec.num_experts - 1
    layers = tuple[tuple[Annotated[int, Between(0, last)], ...], ...]
    hint = Annotated[layers, Items(num_layers, num_layers)]
    try:
        return [list(ids) for ids in checked(hint, read_json_value(path), "layers")]
    except ArtifactError as error:
        raise ArtifactError(
            f"{path}: {error}; expected {num_layers} lists of ids below {spec.num_experts}; make "
            "it again, or remove audio_experts_file from config.json"
        ) from error
