"""Multi-head latent attention in the forms for inference: folded and absorbed projections.

Source: DeepSeek-V2, section 2.1 and appendix C; the tensors' names are those of its checkpoint.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deeptalk_edge.checkpoint.reader import Checkpoint

Array = NDArray[np.float32]


def folded_projections(checkpoint: Checkpoint, attention: str, *, query_scale: float = 1) -> Array:
    """q_proj and kv_a_proj of an attention as one matrix (H nope + (H + 1) rope + latent, C).

    [q_nope | q_rope, k_rope | latent], the rotary parts with their halves apart; `query_scale`
    multiplies the query's rows.
    """
    spec = checkpoint.spec.decoder
    query = checkpoint.tensor(f"{attention}.q_proj.weight") * np.float32(query_scale)
    query = query.reshape(spec.num_heads, spec.nope_dim + spec.rope_dim, spec.width)
    nope, rope = np.split(query, [spec.nope_dim], axis=1)
    latent, key = np.split(
        checkpoint.tensor(f"{attention}.kv_a_proj_with_mqa.weight"), [spec.latent_dim]
    )
    # A pair is side by side in the checkpoint; rotary operators and kernels want its halves apart.
    halves_apart = np.arange(spec.rope_dim).reshape(-1, 2).T.ravel()
    return np.concatenate(
        [
            nope.reshape(-1, spec.width),
            rope[:, halves_apart].reshape(-1, spec.width),
            key[halves_apart],
            latent,
        ]
    )


def absorbed_projections(checkpoint: Checkpoint, attention: str) -> tuple[Array, Array]:
    """kv_b_proj as W_k (H, nope, latent) and W_v (H, latent, value)."""
    spec = checkpoint.spec.decoder
    up = checkpoint.tensor(f"{attention}.kv_b_proj.weight")
    up = up.reshape(spec.num_heads, -1, spec.latent_dim)
    key_up, value_up = np.split(up, [spec.nope_dim], axis=1)
    return key_up, value_up.transpose(0, 2, 1)
