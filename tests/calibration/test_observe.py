"""What a pass over a corpus keeps: every routed token, its inputs, and the greatest latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.bundle.reader import Bundle
from deeptalk_edge.calibration.corpus import Utterance
from deeptalk_edge.calibration.observe import observe
from deeptalk_edge.runtime.backends.ort.engine import OrtEngine


def test_tokens_counts_and_latents_are_those_of_the_conversation(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = bundle.manifest.model.decoder
    read, most = OrtEngine.latents, np.zeros((spec.num_layers, spec.latent_dim), np.float32)

    def latents(engine: OrtEngine, layer: int) -> np.ndarray:
        rows = read(engine, layer)
        for row in rows.reshape(-1, rows.shape[-1]):
            most[layer] = np.maximum(most[layer], np.abs(row[: spec.latent_dim]))
        return rows

    monkeypatch.setattr(OrtEngine, "latents", latents)
    asked = Utterance(
        name="asked", modality="typed", language="en", turns=("hello",), answers=(None,)
    )
    too_long = replace(asked, name="too long", turns=("hello " * 5000,))
    seen = observe(bundle, [asked, too_long], tmp_path, max_rows=12)
    assert seen.num_answers == 1
    assert list(seen.unusable) == ["too long"]
    assert list(seen.tokens) == list(spec.moe_layers)
    for tokens, counts in zip(seen.tokens.values(), seen.counts, strict=True):
        assert len(tokens.x) == len(tokens.ids) == len(tokens.weights) == len(tokens.modality) > 12
        assert tokens.x.any(axis=1).all()
        assert counts.sum() == tokens.ids.size  # all tokens had room
        routed = np.bincount(tokens.ids.ravel(), minlength=spec.num_experts)
        assert routed.tolist() == counts.sum(axis=(1, 2)).tolist()
    assert most.any()
    np.testing.assert_array_equal(seen.latent_most, most)
