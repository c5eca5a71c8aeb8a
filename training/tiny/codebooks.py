"""Keeps every codebook row in use while the quantiser is trained: a good start, then revival."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from deeptalk_edge.training.snac import ResidualQuantizer, VectorQuantizer


class CodeUsage:
    """How often each code is used, as a running mean; one per training."""

    def __init__(self, quantizer: ResidualQuantizer) -> None:
        self._quantizers = list(_levels(quantizer))
        self._means = [torch.zeros(q.codebook.num_embeddings) for q in self._quantizers]

    def count(self, scales: list[Tensor]) -> None:
        """Take one batch's codes."""
        for mean, codes in zip(self._means, scales, strict=True):
            counts = Counter(codes.flatten().tolist())
            mean *= 0.98
            for code, times in counts.items():
                mean[code] += 0.02 * times

    @torch.no_grad()
    def revive(self, projections: list[Tensor]) -> None:
        """Move each code that is hardly used onto a random projection of this batch."""
        for quantizer, mean, projection in zip(
            self._quantizers, self._means, projections, strict=True
        ):
            dead = (mean < 0.02 / quantizer.stride).to(projection.device)
            rows = projection.transpose(1, 2).flatten(0, 1)
            chosen = torch.randint(len(rows), (int(dead.sum()),), device=rows.device)
            quantizer.codebook.weight[dead] = rows[chosen]


@torch.no_grad()
def start_codebooks(quantizer: ResidualQuantizer, latent: Tensor) -> None:
    """Put each scale's codebook where the data is: k-means, slowest scale first.

    A faster scale sees what the slower ones leave over, so each starts after the one before it.
    """
    for level, vector_quantizer in enumerate(_levels(quantizer)):
        projection = quantizer(latent).projections[level]
        rows = projection.transpose(1, 2).flatten(0, 1)
        centres = _spherical_kmeans(rows, vector_quantizer.codebook.num_embeddings)
        vector_quantizer.codebook.weight.copy_(centres * rows.norm(dim=1).mean())


def _spherical_kmeans(rows: Tensor, num_centres: int, num_rounds: int = 20) -> Tensor:
    """Unit centres (num_centres, D) of (R, D) rows by cosine; an empty one restarts at a row."""
    rows = functional.normalize(rows)
    shuffled = torch.randperm(max(len(rows), num_centres), device=rows.device) % len(rows)
    centres = rows[shuffled[:num_centres]].clone()
    for _ in range(num_rounds):
        nearest = (rows @ centres.T).argmax(1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, rows)
        empty = torch.bincount(nearest, minlength=num_centres) == 0
        chosen = torch.randint(len(rows), (int(empty.sum()),), device=rows.device)
        centres[empty] = rows[chosen]
        centres = functional.normalize(centres)
    return centres


def _levels(quantizer: ResidualQuantizer) -> Iterator[VectorQuantizer]:
    for level in quantizer.quantizers:
        assert isinstance(level, VectorQuantizer)
        yield level
