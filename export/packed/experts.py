"""`experts.bin`: one record per routed expert, in the order in which they are best kept together.

Layer by layer, audio experts first (they serve every spoken turn). What a record holds is
expert_record.py's; the weights are brought to its precision here, one expert at a time.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from deeptalk_edge.bundle.expert_record import ExpertRecord, ExpertWeights, RecordFormat
from deeptalk_edge.calibration.quantise import quantise_expert
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import DecoderSpec

EXPERTS_FILE = "experts.bin"


class ExpertSource(Protocol):
    """Where records come from: rounded here, or from a calibration table."""

    def form(self, layer: int) -> RecordFormat:
        """How a layer's experts are held."""

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """One expert in that form.

        Raises ArtifactError if a weight cannot be held in it, or the source is damaged.
        """


class RoundedExperts:
    """A checkpoint's experts, rounded to nearest, all in one form."""

    def __init__(self, checkpoint: Checkpoint, form: RecordFormat) -> None:
        self._checkpoint, self._form = checkpoint, form

    def form(self, layer: int) -> RecordFormat:
        return self._form

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        name = f"model.layers.{layer}.mlp.experts.{expert}"
        gate, up, down = (
            self._checkpoint.tensor(f"{name}.{part}_proj.weight") for part in ("gate", "up", "down")
        )
        try:
            return quantise_expert(self._form, np.concatenate([gate, up]), down)
        except ValueError as error:
            raise ArtifactError(f"{name}: {error}") from error


def write_experts(
    spec: DecoderSpec,
    source: ExpertSource,
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
    kept = list(done) if _are_sound(path, done) else []
    records = list(kept)
    with path.open("r+b" if kept else "wb") as file:
        file.truncate(sum(source.form(record.layer).record_bytes for record in kept))
        file.seek(0, os.SEEK_END)
        for layer, audio in zip(spec.moe_layers, audio_experts, strict=True):
            if any(record.layer == layer for record in kept):
                continue
            form = source.form(layer)
            for expert in expert_order(spec, audio):
                content = form.pack(source.weights(layer, expert))
                records.append(
                    ExpertRecord(
                        layer=layer,
                        expert=expert,
                        offset=file.tell(),
                        bytes=form.content_bytes,
                        crc32=zlib.crc32(content[: form.content_bytes].data),
                    )
                )
                file.write(content.data)
            file.flush()
            os.fsync(file.fileno())
            layer_done(layer, [record for record in records if record.layer == layer])
    return records


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
