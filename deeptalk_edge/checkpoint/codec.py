"""The SNAC of an export: from safetensors, or from the torch file in which it is published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from deeptalk_edge.checkpoint.config import read_codec_spec
from deeptalk_edge.checkpoint.reader import Checkpoint
from deeptalk_edge.checkpoint.shards import Array
from deeptalk_edge.checkpoint.torch_pickle import TorchFile
from deeptalk_edge.errors import ArtifactError
from deeptalk_edge.model.spec import CodecSpec


class CodecWeights(Protocol):
    """SNAC's tensors by name."""

    @property
    def spec(self) -> CodecSpec: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def tensor(self, name: str) -> Array: ...


def open_codec(directory: Path, checkpoint: Checkpoint) -> CodecWeights:
    """The codec in `directory`: the checkpoint's own, or a published one.

    Raises ArtifactError if it reads other codes than the model says.
    """
    published = directory / "pytorch_model.bin"
    is_torch_file = published.is_file() and not (directory / "model.safetensors").is_file()
    codec: CodecWeights = (
        TorchCodec(read_codec_spec(directory), TorchFile(published))
        if is_torch_file
        else checkpoint.codec
    )
    vocabulary = checkpoint.spec.vocabulary
    spoken = (vocabulary.num_codebooks, vocabulary.codebook_size)
    read = (codec.spec.frame_codes, codec.spec.codebook_size)
    if spoken != read:
        raise ArtifactError(
            f"the model says {spoken[0]} codes of {spoken[1]} per frame, this SNAC reads {read[0]} "
            f"of {read[1]}; name the SNAC that the model was trained with by --snac"
        )
    return codec


class TorchCodec:
    """SNAC's tensors out of a torch file."""

    def __init__(self, spec: CodecSpec, file: TorchFile) -> None:
        self.spec = spec
        self.shapes = file.shapes
        self.tensor = file.tensor
