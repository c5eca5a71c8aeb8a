"""How a bundle decodes by default, from its checkpoint's generation config."""

from __future__ import annotations

from typing import Any

from deeptalk_edge.bundle.manifest import Generation
from deeptalk_edge.checkpoint.config import GENERATION_CONFIG, CheckpointConfig
from deeptalk_edge.schema import from_json

_DEFAULT_CONTEXT_ROWS = 4096


def read_generation(config: CheckpointConfig) -> Generation:
    """How to decode by default: the object `deeptalk` of the checkpoint's generation_config.json.

    What is not said there is as in the official scripts. Other fields of that file (DeepSeek's own
    temperature, say) belong to text chat and are left alone.

    Source of the defaults: DeepTalk `eval_qa.py`; the system text is the first sentence of its
    system prompt.

    Raises ArtifactError if a value has the wrong type or the speaker is unknown.
    """
    defaults: dict[str, Any] = {
        "system": "You are an AI robot and your name is Lucy.",
        "speaker": "ANS_A",
        "mode": "batch-parallel",
        "text_top_k": 1,
        "audio_top_k": 10,
        "temperature": 1.0,
        "repetition_penalty": 1.2,
        "max_rows": 1000,
        "context_rows": min(_DEFAULT_CONTEXT_ROWS, config.model.decoder.max_positions),
    }
    where = f"{config.directory / GENERATION_CONFIG}: deeptalk"
    generation = from_json(Generation, {**defaults, **config.generation}, where)
    config.model.vocabulary.speaker(generation.speaker)
    return generation
