"""`train merge`: an adapter and its checkpoint become one checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from deeptalk_edge.files import staged_directory
from deeptalk_edge.schema import read_json
from deeptalk_edge.training.checkpoint import load_model, write_checkpoint
from deeptalk_edge.training.lora import load_adapter
from deeptalk_edge.training.stages.run_directory import carry

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def merge(checkpoint: Path, adapter: Path, out: Path) -> None:
    """Write the merged checkpoint, in the dtype of the one it comes from.

    Raises ArtifactError if one of both is damaged or they do not fit, or `out` exists.
    """
    model, config = load_model(checkpoint), read_json(checkpoint / "config.json")
    load_adapter(model, adapter)
    dtype = _DTYPES.get(str(config.get("torch_dtype")), torch.float32)
    with staged_directory(out) as staging:
        write_checkpoint(staging, model, config, dtype=dtype)
        carry(checkpoint, staging)
