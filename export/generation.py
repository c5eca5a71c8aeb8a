"""How a bundle decodes by default, as its checkpoint asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deeptalk_edge.bundle.manifest import Generation
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.schema import read_json
from deeptalk_edge.spec import ModelSpec

_DEFAULT_CONTEXT_ROWS = 4096


def read_generation(checkpoint: Path, spec: ModelSpec) -> Generation:
    """How to decode by default: the object `deeptalk` of the checkpoint's generation_config.json.

    What is not said there is as in the official scripts. Other fields of that file (DeepSeek's own
    temperature, say) belong to text chat and are left alone.

    Source of the defaults: DeepTalk `eval_qa.py`; the system text is the first sentence of its own.

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
    if unknown := config.keys() - defaults.keys():
        raise ArtifactError(f"{path}: deeptalk has no {', '.join(sorted(unknown))}")
    values = {key: config.get(key, default) for key, default in defaults.items()}
    for key, default in defaults.items():
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if not isinstance(values[key], kinds) or isinstance(values[key], bool):
            raise ArtifactError(f"{path}: {key} = {values[key]!r}, expected {kinds[-1].__name__}")
    if values["mode"] not in ("batch-parallel", "single"):
        raise ArtifactError(f"{path}: mode {values['mode']!r}, known are batch-parallel and single")
    spec.vocabulary.speaker(values["speaker"])
    return Generation(**values)
