"""The random decoder that is timed computes something, whatever its shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from deeptalk_edge.bench.cpu.native import CpuDecoder, CpuForm
from tests.native.cpu import built
from tests.specs import PLAIN

DECODER = replace(
    PLAIN.decoder,
    width=64,
    nope_dim=64,
    rope_dim=32,
    value_dim=64,
    dense_ffn_width=64,
    expert_ffn_width=64,
)


@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("latent_dim", [64, 512])
def test_a_latent_of_any_width_leaves_the_logits_finite(
    latent_dim: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    built.install(monkeypatch)
    spec = replace(PLAIN, decoder=replace(DECODER, latent_dim=latent_dim))
    decoder = CpuDecoder(spec, CpuForm(group=group), [1], cache_rows=8)
    decoder.feed(4)
    assert np.isfinite(decoder.logits).all()
    assert decoder.logits.any()
