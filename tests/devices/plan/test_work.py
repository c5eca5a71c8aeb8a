"""Bytes and operations of the official size, against figures calculated by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deeptalk_edge.checkpoint.config import read_codec_spec, read_model_spec
from deeptalk_edge.devices.plan.memory import record_format
from deeptalk_edge.devices.plan.work import ModelWork, codec_work
from deeptalk_edge.devices.profile import load_profile
from tests.places import OFFICIAL_SIZE as OFFICIAL


@pytest.fixture(scope="module")
def work() -> ModelWork:
    model, codec = read_model_spec(OFFICIAL), read_codec_spec(OFFICIAL / "snac")
    profile = load_profile("thor")  # float16, experts int4 in groups of 128
    return ModelWork.of(model, codec, profile.precision, record_format(model, profile))


def test_the_official_size_has_the_published_figures(work: ModelWork) -> None:
    assert work.dense_bytes == pytest.approx(1.79e9, rel=0.005)
    assert work.head_bytes == 131_584 * 2048 * 2
    assert work.expert_bytes == 3 * 2048 * 1408 * (4 + 16 / 128) / 8
    assert work.row_operations == pytest.approx(2 * 2.24e9, rel=0.005)  # 2.24 B active weights
    assert work.prefill_operations(280) == pytest.approx(1.26e12, rel=0.005)
    assert work.encoder_operations(1500) == pytest.approx(1.14e12, rel=0.005)
    assert 1024 * work.cache_row_bytes == pytest.approx(0.03e9, rel=0.07)  # one digit


def test_a_codec_frame_has_the_packages_operations_without_noise(
    work: ModelWork,
) -> None:
    # 0.83 GFLOP by torch's counter on the package; its noise, which bundles leave out, is a matrix
    # of (halved, halved) a sample in each block: 2 x (512^2 x 32 + 256^2 x 256 + ...) / frame.
    rows, width, noise = 4, 1024, 0.0
    for stride in (8, 8, 4, 2):
        rows, width = rows * stride, width // 2
        noise += 2 * rows * width**2
    assert work.codec.operations + noise == pytest.approx(0.83e9, rel=0.05)


def test_our_kernels_run_the_last_mlp_on_one_row_of_a_prefill(work: ModelWork) -> None:
    model, codec = read_model_spec(OFFICIAL), read_codec_spec(OFFICIAL / "snac")
    profile = load_profile("cpu-int8")
    records = record_format(model, profile)
    alone = ModelWork.of(model, codec, profile.precision, records, keeps_last_row=True)
    every = ModelWork.of(model, codec, profile.precision, records)
    mlp = 2 * 8 * 3 * 2048 * 1408  # six routed experts and two shared ones
    saved = every.prefill_operations(64) - alone.prefill_operations(64)
    assert saved == pytest.approx(63 * mlp)
    assert alone.prefill_operations(1) == every.prefill_operations(1)
    experts = (every.experts_of(64) - 6) * every.expert_bytes
    assert every.prefill_bytes(64) - alone.prefill_bytes(64) == pytest.approx(experts)
    assert alone.prefill_bytes(1) == every.prefill_bytes(1)


def test_a_frame_reads_the_codecs_weights_once_and_bends_what_its_units_make() -> None:
    found = codec_work(read_codec_spec(OFFICIAL / "snac"), value_bytes=4)
    # 4 x 1024, then 6 times (32 x 512, 256 x 256, 1024 x 128, 2048 x 64)
    assert found.activations == 4 * 1024 + 6 * (32 * 512 + 256 * 256 + 1024 * 128 + 2048 * 64)
    assert found.weight_bytes == pytest.approx(50.6e6, rel=0.001)
    half = codec_work(read_codec_spec(OFFICIAL / "snac"), value_bytes=2)
    assert half.weight_bytes == found.weight_bytes / 2


@pytest.mark.parametrize(("items", "alike", "experts"), [(1, True, 6), (2, True, 11.4375)])
def test_items_with_different_routes_share_a_few_experts(
    work: ModelWork, items: int, alike: bool, experts: float
) -> None:
    assert work.experts_of(items, alike=alike) == pytest.approx(experts)
    assert work.experts_of(2, alike=False) == 12
    assert work.experts_of(1000) == pytest.approx(64)


def test_a_step_reads_each_dense_weight_once_and_the_cache_of_each_item(work: ModelWork) -> None:
    one, two = work.step_bytes(1, 1000), work.step_bytes(2, 1000)
    experts = 26 * (work.experts_of(2) - 6) * work.expert_bytes
    assert two - one == pytest.approx(experts + 1000 * work.cache_row_bytes)
    wider = replace(work, dense_bytes=work.dense_bytes + 7)
    assert wider.step_bytes(2, 1000) == two + 7
