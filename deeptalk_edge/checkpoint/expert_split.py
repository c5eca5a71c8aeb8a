"""Which experts of a checkpoint are the audio experts: the file that config.json names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from deeptalk_edge.checkpoint.config import CheckpointConfig
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.schema import Between, Items, checked, read_json_value


def read_audio_experts(config: CheckpointConfig) -> list[list[int]]:
    """One list of audio experts per MoE layer; empty ones if the checkpoint does not name them.

    `audio_experts_file` may be a path on its authors' disk: a file of that name beside config.json
    serves too. The order of the records and the coverage of a calibration hang on it.

    Raises ArtifactError if the file does not fit the model.
    """
    spec, place = config.model.decoder, config.directory
    named = config.content.get("audio_experts_file")
    paths = [place / named, place / Path(named).name] if named else []
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
