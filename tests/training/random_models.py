"""Models with random weights, large enough that a wrong equation shows in the logits."""

from __future__ import annotations

import torch

from deeptalk_edge.model.spec import ModelSpec
from deeptalk_edge.training.model import DeepTalk


def random_model(spec: ModelSpec, seed: int = 0) -> DeepTalk:
    """Matrices that keep a vector's size, norms near 1, and distinct biases."""
    model = DeepTalk(spec).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.data = 0.1 * noise
        elif "norm" in name:
            parameter.data = 1 + 0.1 * noise
        elif "embed" in name:
            parameter.data = noise
        else:
            parameter.data = noise / parameter[0].numel() ** 0.5
    if spec.tied_head:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def random_rows(spec: ModelSpec, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Rows (B, T, K + 1) of ids from the whole vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, length, spec.vocabulary.num_codebooks + 1)
    return torch.randint(spec.vocabulary.size, shape, generator=generator)
