"""Values derived from a model's numbers: YaRN's frequencies and scales as in DeepSeek-V2."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from deeptalk_edge.bench.random_snac import SNAC_24KHZ
from deeptalk_edge.model.spec import DecoderSpec, YarnSpec
from tests.specs import PLAIN

# Of DeepSeek-V2-Lite's config.json.
YARN = YarnSpec(
    factor=40.0,
    original_positions=4096,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=0.707,
    mscale_all_dim=0.707,
)
LITE: DecoderSpec = replace(
    PLAIN.decoder, nope_dim=128, rope_dim=64, rope_theta=10_000.0, yarn=YARN
)


def test_yarn_keeps_fast_frequencies_stretches_slow_ones_and_ramps_between() -> None:
    """The ramp goes from dimension 10, the last that turns 32 times within 4,096 rows (10.47), to
    23, the first that turns less than once (22.51)."""
    plain = [10_000.0 ** (-i / 32) for i in range(32)]
    found = LITE.rope_frequencies()
    assert found[:11] == pytest.approx(plain[:11])
    assert found[23:] == pytest.approx([f / 40 for f in plain[23:]])
    for i in range(11, 23):
        share = (i - 10) / 13
        assert found[i] == pytest.approx(plain[i] * ((1 - share) + share / 40))


def test_yarns_scale_is_squared_in_the_scores_and_cancels_in_the_rotation() -> None:
    correction = 0.1 * 0.707 * math.log(40) + 1
    assert pytest.approx(192**-0.5 * correction**2) == LITE.softmax_scale
    assert LITE.rope_amplitude == 1.0
    uneven = replace(LITE, yarn=replace(YARN, mscale_all_dim=0.0))
    assert uneven.rope_amplitude == pytest.approx(correction)
    assert uneven.softmax_scale == pytest.approx(192**-0.5)


def test_without_yarn_nothing_is_stretched() -> None:
    plain = replace(LITE, yarn=None)
    assert plain.rope_frequencies() == [10_000.0 ** (-i / 32) for i in range(32)]
    assert (plain.rope_amplitude, plain.softmax_scale) == (1.0, 192**-0.5)


@pytest.mark.parametrize(
    "wrong", [{"top_k": 5}, {"num_dense_layers": 3}, {"rope_dim": 9}], ids=lambda w: next(iter(w))
)
def test_an_impossible_decoder_is_refused(wrong: dict[str, int]) -> None:
    four = replace(PLAIN.decoder, num_experts=4, top_k=4, num_layers=3, num_dense_layers=2)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = {next(iter(wrong.values()))}"):
        replace(four, **wrong)  # type: ignore[arg-type]


def test_a_codec_is_as_late_as_its_kernels_and_upsamplings_look_ahead() -> None:
    """By hand for rates 8, 8, 4, 2: 3 * 8 + 43, 67 * 8 + 43, 579 * 4 + 41, 2357 * 2 + 40, + 3."""
    assert SNAC_24KHZ.decoder_rates == (8, 8, 4, 2)
    assert SNAC_24KHZ.delay_samples == 4757
