"""`experts.bin`: one record per routed expert, in the order in which they are best kept together.

Layer by layer, audio experts first (they serve every spoken turn), each record on its own page:
`gate_up` (2G, C), then `down` (C, G), float32, row-major.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deeptalk_edge.checkpoint import Checkpoint
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.export.graph import WeightFile
from deeptalk_edge.runtime.experts.store import ExpertRecord
from deeptalk_edge.spec import DecoderSpec, read_json

EXPERTS_FILE = "experts.bin"


def write_experts(
    checkpoint: Checkpoint,
    audio_experts: Sequence[Sequence[int]],
    directory: Path,
    layer_done: Callable[[int], None],
) -> list[ExpertRecord]:
    """Write experts.bin; `audio_experts` holds one list of expert ids per MoE layer."""
    spec = checkpoint.spec.decoder
    records = []
    with WeightFile(directory / EXPERTS_FILE) as file:
        for layer, audio in zip(spec.moe_layers, audio_experts, strict=True):
            for expert in expert_order(spec, audio):
                name = f"model.layers.{layer}.mlp.experts.{expert}"
                gate, up, down = (
                    checkpoint.tensor(f"{name}.{part}_proj.weight").ravel()
                    for part in ("gate", "up", "down")
                )
                record = np.concatenate([gate, up, down])
                stored = file.append(record)
                records.append(
                    ExpertRecord(
                        layer=layer,
                        expert=expert,
                        offset=stored.offset,
                        bytes=stored.num_bytes,
                        crc32=zlib.crc32(record.data),
                    )
                )
            layer_done(layer)
    return records


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
    lists = _read_lists(path)
    fits = (
        isinstance(lists, list)
        and len(lists) == len(spec.moe_layers)
        and all(isinstance(ids, list) and set(ids) <= set(range(spec.num_experts)) for ids in lists)
    )
    if not fits:
        raise ArtifactError(
            f"{path}: expected {len(spec.moe_layers)} lists of ids below {spec.num_experts}; "
            "make it again, or remove audio_experts_file from config.json"
        )
    return [list(ids) for ids in lists]


def _read_lists(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable as JSON ({error})") from error
