"""`train merge`: an adapter and its checkpoint become one checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from deeptalk_edge.checkpoint.config import read_config
from deeptalk_edge.files import staged_directory
from deeptalk_edge.training.checkpoint import model_of, write_checkpoint
from deeptalk_edge.training.lora import load_adapter
from deeptalk_edge.training.stages.run_directory import carry

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def merge(checkpoint: Path, adapter: Path, out: Path) -> None:
    """Write the merged checkpoint, in the dtype of the one it comes from.

    Raises ArtifactError if one of both is damaged or they do not fit, or `out` exists.
    """
    config = read_config(checkpoint)
    model = model_of(config)
    load_adapter(model, adapter)
    dtype = _DTYPES.get(str(config.content.get("torch_dtype")), torch.float32)
    with staged_directory(out) as staging:
        write_checkpoint(staging, model, config.content, dtype=dtype)
        carry(checkpoint, staging, config.content)
