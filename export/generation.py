"""How a bundle decodes by default, from its checkpoint's generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deeptalk_edge.bundle.manifest import Generation
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.schema import from_json, read_json

_DEFAULT_CONTEXT_ROWS = 4096


def read_generation(checkpoint: Path, spec: ModelSpec) -> Generation:
    """How to decode by default: the object `deeptalk` of the checkpoint's generation_config.json.

    What is not said there is as in the official scripts. Other fields of that file (DeepSeek's own
    temperature, say) belong to text chat and are left alone.

    Source of the defaults: DeepTalk `eval_qa.py`; the system text is the first sentence of its
    system prompt.

    Raises ArtifactError if a value has the wrong type or the speaker is unknown.
    """
    path = checkpoint / "generation_config.json"
    config = read_json(path).get("deeptalk", {}) if path.is_file() else {}
    defaults: dict[str, Any] = {
        "system": "You are an AI robot and your name is Lucy.",
        "speaker": "ANS_A",
        "mode": "batch-parallel",
        "text_top_k": 1,
        "audio_top_k": 10,
        "temperature": 1.0,
        "repetition_penalty": 1.2,
        "max_rows": 1000,
        "context_rows": min(_DEFAULT_CONTEXT_ROWS, spec.decoder.max_positions),
    }
    if not isinstance(config, dict):
        raise ArtifactError(f"{path}: deeptalk is a {type(config).__name__}, expected an object")
    generation = from_json(Generation, {**defaults, **config}, f"{path}: deeptalk")
    spec.vocabulary.speaker(generation.speaker)
    return generation
