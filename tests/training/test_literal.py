"""The whole torch model against the equations written out in reference.py."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from deeptalk_edge.model.rows import audio_rows
from deeptalk_edge.model.spec import DecoderSpec, ModelSpec, YarnSpec
from deeptalk_edge.training.model import align_features
from tests.specs import DECODER, SPECS
from tests.training import reference
from tests.training.random_models import random_model, random_rows

TOLERANCE = 1e-4  # float32 against float64, on logits of some units


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_the_model_equals_the_equations(spec: ModelSpec) -> None:
    """A sentence, an utterance of 5 frames, a sentence; then all eight heads of every row."""
    model = random_model(spec, seed=3)
    heard, heard_mask = audio_rows(spec.vocabulary, audio_id=7, num_frames=5)
    before, after = random_rows(spec, 1, 4, seed=1), random_rows(spec, 1, 3, seed=2)
    rows = torch.cat([before, torch.from_numpy(heard)[None], after], dim=1)
    audio_mask = torch.zeros(rows.shape[:2], dtype=torch.bool)
    audio_mask[0, 4 : 4 + len(heard)] = torch.from_numpy(heard_mask)
    log_mel = torch.randn(1, spec.encoder.num_mel_bins, 2 * spec.encoder.max_frames)
    with torch.no_grad():
        features = model.encode(log_mel)
        aligned = align_features(features, audio_mask)
        hidden = model(rows, aligned, audio_mask)

    weights = {name: w.double().numpy() for name, w in model.state_dict().items()}
    encoded = reference.encode(spec, weights, log_mel[0].double().numpy())
    np.testing.assert_allclose(features[0], encoded, atol=TOLERANCE)
    placed = np.zeros((rows.shape[1], spec.decoder.width))
    placed[audio_mask[0].numpy()] = encoded[:5]
    mixed = reference.embed(spec, weights, rows[0].numpy(), placed, audio_mask[0].numpy())
    expected = reference.decode(spec, weights, mixed)
    np.testing.assert_allclose(hidden[0], expected, atol=TOLERANCE)
    text = reference.text_logits(spec, weights, expected)
    np.testing.assert_allclose(model.text_logits(hidden)[0].detach(), text, atol=TOLERANCE)
    codes = reference.code_logits(spec, weights, expected)
    np.testing.assert_allclose(model.code_logits(hidden)[0].detach(), codes, atol=TOLERANCE)


DEEPSEEK_V2_LITE = replace(
    DECODER,
    nope_dim=128,
    rope_dim=64,
    yarn=YarnSpec(
        factor=40,
        original_positions=4096,
        beta_fast=32,
        beta_slow=1,
        mscale=0.707,
        mscale_all_dim=0.707,
    ),
)


def test_the_real_models_attention_scale_and_rotary_ramp_are_the_published_ones() -> None:
    decoder: DecoderSpec = DEEPSEEK_V2_LITE
    assert decoder.softmax_scale == pytest.approx(0.114721, abs=1e-6)
    assert decoder.rope_amplitude == 1
    plain = replace(decoder, yarn=None).rope_frequencies()
    shrunk = [f / g for f, g in zip(plain, decoder.rope_frequencies(), strict=True)]
    assert [round(s, 6) for s in shrunk[:11]] == [1] * 11
    assert shrunk[11] > 1
    assert shrunk[22] < 40
    assert shrunk[23:] == pytest.approx([40] * 9)
    literal = [reference.frequency(decoder, j) for j in range(32)]
    assert decoder.rope_frequencies() == pytest.approx(literal)
