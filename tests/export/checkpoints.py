"""Whole checkpoints with random weights, on disk, and graphs to run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from deeptalk_edge.model.spec import CodecSpec, ModelSpec
from deeptalk_edge.training.checkpoint import config_of, save_checkpoint
from deeptalk_edge.training.model import DeepTalk
from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.snac_files import save_snac
from tests.specs import PLAIN
from tests.training.random_models import random_model

Array = NDArray[np.float32]

CODEC = CodecSpec(
    sampling_rate=24000,
    encoder_dim=2,
    encoder_rates=(2, 4, 8, 8),
    latent_dim=12,
    decoder_dim=32,
    decoder_rates=(8, 8, 4, 2),
    codebook_size=32,
    codebook_dim=5,
    vq_strides=(4, 2, 1),
    noise=True,
    depthwise=True,
)
ODD_CODEC = replace(
    CODEC, decoder_rates=(3, 5), vq_strides=(3, 1), noise=False, depthwise=False, decoder_dim=12
)
"""Odd rates, two scales, dense convolutions, no noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A checkpoint and the models that it was written from."""

    place: Path
    model: DeepTalk
    codec: Snac


def write_checkpoint(place: Path, spec: ModelSpec = PLAIN, **config: Any) -> Written:
    """Write model, codec and tokenizer; `config` adds fields to config.json."""
    model = random_model(spec)
    save_checkpoint(place, model, {**config_of(spec), **config})
    (place / "tokenizer.json").write_text("{}", encoding="utf-8")
    codec = random_codec(CODEC)
    save_snac(codec, place / "snac")
    for tensor in codec.state_dict().values():
        tensor.copy_(tensor.half())  # save_snac stores halves
    return Written(place=place, model=model, codec=codec)


def random_codec(spec: CodecSpec) -> Snac:
    """A codec whose weights all differ and are large enough for tanh to be nonlinear."""
    torch.manual_seed(1)
    codec = Snac(spec, with_encoder=False).eval()
    with torch.no_grad():
        for parameter in codec.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return codec


class CodecTensors:
    """A codec's tensors in the exporter's form."""

    def __init__(self, codec: Snac) -> None:
        self.spec = codec.spec
        self._tensors = {name: t.detach().numpy() for name, t in codec.state_dict().items()}
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> Array:
        return np.array(self._tensors[name], np.float32)


def edit_config(checkpoint: Path, **fields: Any) -> None:
    """Change fields of config.json."""
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}), encoding="utf-8")


def check_graphs(directory: Path) -> int:
    """Run onnx's checker, shape inference and data included, on every graph; returns how many."""
    paths = list(directory.glob("*.onnx"))
    for path in paths:
        onnx.checker.check_model(str(path), full_check=True)
    return len(paths)
