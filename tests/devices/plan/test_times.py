"""A roofline's arithmetic on a model small enough to calculate by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeptalk_edge.devices.plan.times import (
    FLOOR,
    Assumptions,
    Question,
    Rates,
    hit_share,
    times,
)
from deeptalk_edge.devices.plan.work import CodecWork, ModelWork
from deeptalk_edge.model.spec import EncoderSpec

WORK = ModelWork(
    dense_bytes=1_000_000_000,
    head_bytes=500_000_000,
    expert_bytes=5_000_000,
    num_moe_layers=10,
    num_experts=100,
    top_k=10,
    cache_row_bytes=0,
    encoder_bytes=1_000_000,
    row_operations=4e9,
    head_operations=1e9,
    encoder=EncoderSpec(
        num_mel_bins=80, width=64, num_layers=1, num_heads=1, ffn_width=64, max_frames=100
    ),
    encoder_row_weights=10_000_000,
    codec=CodecWork(operations=1e9, weight_bytes=50e6, activations=2e6),
)
RATES = Rates(memory_gb_per_s=100, product_tops=10, link_gb_per_s=5)
ASKED = Question(seconds=1.0, num_items=1)


def test_a_step_takes_its_bytes_divided_by_the_reached_memory_rate() -> None:
    found = times(WORK, RATES, ASKED, 1.0, Assumptions(step_efficiency=0.5))
    # 1.5 GB and 10 layers of 10 experts of 5 MB: 2 GB at 50 GB/s
    assert found.step_ms[1] == pytest.approx(40)
    assert found.step_ms[2] == pytest.approx(1000 * (1.5 + 0.95) / 50)
    assert found.limit == {1: "memory", 2: "memory"}


def test_a_slow_processor_is_the_limit() -> None:
    slow = replace(RATES, product_tops=0.05)
    found = times(WORK, slow, ASKED, 1.0, Assumptions())
    assert found.step_ms[1] == pytest.approx(100)
    assert found.limit[1] == "products"


def test_on_a_cpu_reads_and_products_of_many_rows_add_up() -> None:
    hidden, added = Assumptions(), Assumptions(reads_hide=False)
    asked = replace(ASKED, seconds=0.0)
    one, other = (times(WORK, RATES, asked, 1.0, assumed) for assumed in (hidden, added))
    rows = hidden.prompt_rows
    products_ms = rows * 4e9 / (0.4 * 10e9)
    reads_ms = WORK.prefill_bytes(rows) / (0.5 * 100e6)
    assert one.prefill_ms == pytest.approx(max(products_ms, reads_ms))
    assert other.prefill_ms == pytest.approx(products_ms + reads_ms)


def test_a_frame_of_the_codec_is_products_weights_and_activations() -> None:
    rates = replace(RATES, activations_g_per_s=0.5)
    added = Assumptions(reads_hide=False)
    products_ms, reads_ms, activations_ms = 1e9 / 4e9, 50e6 / 50e6, 2e6 / 0.5e6
    found = times(WORK, rates, ASKED, 1.0, added)
    assert found.codec_ms == pytest.approx(products_ms + reads_ms + activations_ms)
    on_a_gpu = times(WORK, RATES, ASKED, 1.0, Assumptions())
    assert on_a_gpu.codec_ms == pytest.approx(max(products_ms, reads_ms))


def test_missing_experts_are_read_once_in_prefill_and_by_chance_in_steps() -> None:
    found = times(WORK, RATES, ASKED, 0.5, Assumptions(guesses=False))
    assert found.paging_ms == pytest.approx(0.5 * 5000 / 5)  # half of 5 GB at 5 GB/s
    misses = 1 - hit_share(0.5, guesses=False)
    assert found.stall_ms[1] == pytest.approx(misses * 100 * 5e6 / 5e6)
    assert found.limited_by in ("steps", "paging")
    assert times(WORK, RATES, ASKED, 1.0, Assumptions()).paging_ms == 0


def test_voice_to_voice_is_the_sum_of_its_parts() -> None:
    assumed = Assumptions(hangover_ms=250, buffer_ms=30, first_frame_steps=7, codec_steps=1)
    found = times(WORK, RATES, ASKED, 0.9, assumed)
    parts = found.encoder_ms + found.prefill_ms + found.paging_ms + 8 * found.step_ms[1]
    assert found.voice_to_voice_ms == pytest.approx(250 + 30 + parts)
    assert found.first_sound_ms == pytest.approx(30 + parts)


def test_a_near_window_is_shorter_than_the_whole() -> None:
    near = replace(ASKED, encoder_frames=50)
    one, other = (times(WORK, RATES, asked, 1.0, FLOOR) for asked in (ASKED, near))
    assert other.encoder_ms < one.encoder_ms
    assert other.prefill_ms == one.prefill_ms


@given(share=st.floats(0, 1))
def test_more_memory_never_waits_longer(share: float) -> None:
    little = times(WORK, RATES, ASKED, share, Assumptions())
    more = times(WORK, RATES, ASKED, min(1, share + 0.1), Assumptions())
    assert more.voice_to_voice_ms <= little.voice_to_voice_ms + 1e-9
    assert 0 <= hit_share(share, guesses=False) <= hit_share(share, guesses=True) <= 1


def test_no_estimate_is_below_the_floor() -> None:
    floor = times(WORK, RATES, ASKED, 1.0, FLOOR)
    expected = times(WORK, RATES, ASKED, 1.0, Assumptions())
    assert floor.voice_to_voice_ms < expected.voice_to_voice_ms
    assert floor.step_ms[2] < expected.step_ms[2]
