"""A checkpoint of any size that needs no disk space: random weights, made on demand.

Same sizes and speed as a trained checkpoint; its output is noise.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.checkpoint.config import read_codec_spec
from deeptalk_edge.checkpoint.reader import Checkpoint, expected_tensors
from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.schema import read_json
from deeptalk_edge.training.snac import Snac
from deeptalk_edge.training.snac_files import save_snac

_POOL = 0.02 * np.random.default_rng(0).standard_normal(1 << 20, np.float32)


class RandomCheckpoint(Checkpoint):
    """Every tensor of a model's sizes; `snac` is a codec's directory."""

    def __init__(self, spec: ModelSpec, snac: Path) -> None:
        self.spec = spec
        self._snac = snac
        self._shapes = expected_tensors(spec)

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return a tensor that differs from all others, because builders store equal constants
        once; norms are near 1."""
        values = np.roll(_POOL, zlib.crc32(name.encode()) % len(_POOL))
        if name.endswith("norm.weight"):
            values = 1 + values
        return np.resize(values, self._shapes[name])


def write_sizes(like: Path, place: Path, *, num_layers: int | None = None) -> None:
    """Write the other files of a checkpoint with the sizes of `like`: its config files, an empty
    tokenizer and a codec with random weights."""
    place.mkdir(parents=True)
    config = read_json(like / "config.json")
    if num_layers is not None:
        config["num_hidden_layers"] = num_layers
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (place / "tokenizer.json").write_text("{}", encoding="utf-8")
    encoder = str(config["mm_audio_encoder"])
    (place / encoder).mkdir()
    shutil.copyfile(like / encoder / "config.json", place / encoder / "config.json")
    save_snac(Snac(read_codec_spec(like / "snac"), with_encoder=False), place / "snac")
