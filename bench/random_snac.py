"""A codec with random weights: same speed as a trained one; its output is noise."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.model.spec import CodecSpec
from deeptalk_edge.training.snac import Snac

SNAC_24KHZ = CodecSpec(
    sampling_rate=24000,
    encoder_dim=48,
    encoder_rates=(2, 4, 8, 8),
    latent_dim=768,
    decoder_dim=1024,
    decoder_rates=(8, 8, 4, 2),
    codebook_size=4096,
    codebook_dim=8,
    vq_strides=(4, 2, 1),
    noise=True,
    depthwise=True,
)
"""The released codec's sizes. Source: its config.json, hubertsiuzdak/snac_24khz."""


class RandomSnac:
    """See `CodecWeights`."""

    def __init__(self, spec: CodecSpec) -> None:
        self.spec = spec
        state = Snac(spec, with_encoder=False).state_dict()
        self._tensors = {name: tensor.numpy() for name, tensor in state.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def tensor(self, name: str) -> NDArray[np.float32]:
        return np.asarray(self._tensors[name], np.float32)
