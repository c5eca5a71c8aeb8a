"""The bytes of a step are counted correctly; every share of the roofline depends on them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deeptalk_edge.bench.cpu.native import CpuForm
from deeptalk_edge.bench.cpu.sizes import Form, mlp_weights, step_bytes
from deeptalk_edge.bundle.expert_record import RecordFormat
from deeptalk_edge.checkpoint.config import read_model_spec
from tests.places import OFFICIAL_SIZE

OFFICIAL = read_model_spec(OFFICIAL_SIZE)
INT4 = CpuForm().stored


def test_one_expert_more_is_one_record_of_each_layer_more() -> None:
    more = replace(OFFICIAL, decoder=replace(OFFICIAL.decoder, top_k=7))
    record = RecordFormat(dtype="int4", group=64, width=2048, ffn_width=1408)
    added_bytes = step_bytes(more, INT4, 0) - step_bytes(OFFICIAL, INT4, 0)
    assert added_bytes == 26 * record.content_bytes


def test_experts_that_are_not_chosen_cost_their_router_row_only() -> None:
    fewer = replace(OFFICIAL, decoder=replace(OFFICIAL.decoder, num_experts=16))
    saved_bytes = step_bytes(OFFICIAL, INT4, 0) - step_bytes(fewer, INT4, 0)
    assert saved_bytes == 26 * 48 * 2048 * 4


def test_a_cached_row_costs_its_width_in_every_layer() -> None:
    assert step_bytes(OFFICIAL, INT4, 101) - step_bytes(OFFICIAL, INT4, 100) == 27 * 576 * 2


def test_head_matrices_may_be_stored_wider_than_the_others() -> None:
    plain = Form(weight_bits=4, cache_value_bytes=2)
    wide = replace(plain, head_weight_bits=32)
    assert step_bytes(OFFICIAL, wide, 0) - step_bytes(OFFICIAL, plain, 0) == pytest.approx(
        27 * 16 * 512 * (128 + 128) * 28 / 8
    )


def test_the_official_decoder_uses_2_2_billion_weights_besides_attention() -> None:
    experts = 26 * 8 * 3 * 2048 * 1408
    assert mlp_weights(OFFICIAL.decoder) == experts + 3 * 2048 * 10944
