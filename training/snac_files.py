"""SNAC's directory: config.json and weights, read with every tensor checked by name and shape."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from deeptalk_edge.checkpoint.config import read_codec_spec
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.files import staged_directory
from deeptalk_edge.training.snac import Snac

_FILES = ("config.json", "model.safetensors")


def load_snac(directory: Path) -> Snac:
    """Read config.json and model.safetensors (or SNAC's own pytorch_model.bin), as float32.

    Raises ArtifactError, naming the tensor, if one is missing, unknown or misshapen; all of
    encoder.* may be absent.
    """
    tensors = _read_tensors(directory)
    with_encoder = any(name.startswith("encoder.") for name in tensors)
    codec = Snac(read_codec_spec(directory), with_encoder=with_encoder)
    expected = codec.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ArtifactError(f"{directory}: the tensor {name} is missing")
        if name not in expected:
            raise ArtifactError(f"{directory}: config.json has no place for the tensor {name}")
        found, wanted = tuple(tensors[name].shape), tuple(expected[name].shape)
        if found != wanted:
            raise ArtifactError(f"{directory}: {name} is {found}, config.json says {wanted}")
    codec.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return codec.eval()


def save_snac(codec: Snac, directory: Path) -> None:
    """Write config.json and model.safetensors (float16) in place of a SNAC that is there.

    Raises ArtifactError if something else is there.
    """
    config = {**asdict(codec.spec), "attn_window_size": None}
    tensors = {name: t.detach().cpu().half().contiguous() for name, t in codec.state_dict().items()}
    with staged_directory(directory, replaces=_FILES) as staging:
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (staging / "model.safetensors").write_bytes(save(tensors))


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    try:
        if (directory / "model.safetensors").is_file():
            return load_file(directory / "model.safetensors")
        path = directory / "pytorch_model.bin"
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        return tensors
    except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ArtifactError(f"{directory}: no readable SNAC weights ({error})") from error
