"""The simulator and the pager agree on every hit, miss and byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deeptalk_edge.devices.replay.simulator import ReplaySettings, SimulatedDevice, replay, simulate
from deeptalk_edge.devices.replay.synthetic import DialogueShape, synthetic_routes
from deeptalk_edge.runtime.experts.policy import POLICIES, Phase, Policy
from deeptalk_edge.runtime.experts.residency import Cause
from deeptalk_edge.runtime.experts.routes import Routes
from tests.places import ROOT
from tests.runtime.experts.records import (
    NUM_EXPERTS,
    NUM_LAYERS,
    NUM_RECORDS,
    RECORD_BYTES,
    open_pager,
    write_records,
)

DEVICE = SimulatedDevice(
    pool_bytes=13 * RECORD_BYTES,
    record_bytes=RECORD_BYTES,
    link_gbps=0.01,
    attention_ms=0.4,
    experts_ms=0.6,
    fixed_ms=6,
    prefill_row_ms=0.03,
    prefill_expert_ms=0.07,
)


@pytest.fixture(scope="module")
def routes() -> Routes:
    shape = DialogueShape(
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        top_k=2,
        record_bytes=RECORD_BYTES,
        num_turns=3,
        question_s=0.5,
        answer_s=2.0,
        num_audio_experts=4,
    )
    return synthetic_routes("mid", shape, seed=3)


def maker(name: str) -> Callable[[int, int], Policy]:
    return lambda num_keys, num_experts: POLICIES[name](num_keys, num_experts, None)


def run_pager(
    path: Path, routes: Routes, policy: str, num_slots: int, *, look_ahead: bool
) -> dict[str, Any]:
    """Drive a real pager, file and threads and all, through the routes."""
    records = write_records(path)
    with open_pager(path, records, num_slots=num_slots, policy=policy) as pager:
        for each in routes.passes:
            pager.enter(each.phase)
            if each.phase is Phase.LISTENING:
                pager.drain()
            for call in each.calls:
                num_left = len(call.experts)
                for lease in pager.waves(call.layer, call.experts):
                    num_left -= len(lease.slots)
                    if look_ahead and not num_left and len(call.predicted):
                        pager.hint(call.layer + 1, call.hinted)
                        pager.drain()
        return pager.report()


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_slots", [NUM_RECORDS, 21, 13, 8, 4])
def test_simulator_and_pager_agree_exactly(
    tmp_path: Path, routes: Routes, policy: str, num_slots: int, look_ahead: bool
) -> None:
    report = run_pager(tmp_path / "experts.bin", routes, policy, num_slots, look_ahead=look_ahead)
    settings = ReplaySettings(num_slots=num_slots, look_ahead=look_ahead)
    residency = replay(routes, maker(policy), settings)
    assert report["hits_by_layer"] == residency.hits.tolist()
    assert report["misses_by_layer"] == residency.misses.tolist()
    assert report["evictions"] == residency.num_evicted
    moved = {cause.value: count * RECORD_BYTES for cause, count in residency.num_loads.items()}
    assert report["moved_bytes"] == moved


def test_an_endless_pool_reads_every_expert_once(routes: Routes) -> None:
    settings = ReplaySettings(num_slots=NUM_RECORDS, look_ahead=False)
    residency = replay(routes, maker("lru"), settings)
    assert residency.misses.sum() == residency.num_loads[Cause.DEMAND] <= NUM_RECORDS
    assert residency.num_evicted == 0


def test_a_resident_model_waits_for_nothing(routes: Routes) -> None:
    settings = ReplaySettings(num_slots=NUM_RECORDS)
    _, timing = simulate(routes, maker("lru"), settings, DEVICE)
    assert sum(timing.stall_ms[-10:]) == 0
    step_ms = NUM_LAYERS * (DEVICE.attention_ms + DEVICE.experts_ms) + DEVICE.fixed_ms
    assert timing.step_ms[-1] == pytest.approx(step_ms)


def test_a_slower_link_makes_slower_steps_and_the_clock_loses_no_time(routes: Routes) -> None:
    settings = ReplaySettings(num_slots=13, look_ahead=False)
    slow = replace(DEVICE, link_gbps=0.005)
    (one, fast_times), (other, slow_times) = (
        simulate(routes, maker("lru"), settings, device) for device in (DEVICE, slow)
    )
    assert one.misses.tolist() == other.misses.tolist()
    assert np.mean(slow_times.step_ms) > np.mean(fast_times.step_ms)
    busy_ms = other.num_loads[Cause.DEMAND] * slow.transfer_ms
    assert slow_times.link_busy_ms == pytest.approx(busy_ms)
    assert slow_times.link_busy_ms < slow_times.total_ms


def test_speech_takes_its_time_whatever_rows_are_fed_before(routes: Routes) -> None:
    (question,) = (each for each in routes.passes if each.turn == 1 and each.num_heard)
    calls = [call._replace(modality=np.zeros_like(call.modality)) for call in question.calls]
    passes = list(routes.passes)
    passes.insert(1, replace(question, calls=calls))  # a system prompt
    settings = ReplaySettings(num_slots=NUM_RECORDS, sweep_share=0.0)
    (_, plain), (_, opened) = (
        simulate(each, maker("lru"), settings, DEVICE)
        for each in (routes, replace(routes, passes=passes))
    )
    extra_ms = opened.total_ms - plain.total_ms
    assert opened.first_audio_ms[0] - plain.first_audio_ms[0] == pytest.approx(extra_ms)


def test_looking_ahead_hides_waiting(routes: Routes) -> None:
    means = [
        np.mean(
            simulate(
                routes,
                maker("lru"),
                ReplaySettings(num_slots=21, look_ahead=look_ahead),
                DEVICE,
            )[1].stall_ms
        )
        for look_ahead in (False, True)
    ]
    assert means[1] < means[0]


def test_the_link_moves_exactly_the_loaded_bytes(routes: Routes) -> None:
    settings = ReplaySettings(num_slots=13)
    residency, timing = simulate(routes, maker("phased"), settings, DEVICE)
    num_loads = sum(residency.num_loads.values())
    assert timing.link_busy_ms <= num_loads * DEVICE.transfer_ms + 1e-6
    assert residency.num_cancelled > 0


@pytest.mark.parametrize("num_slots", [3, 4, 5, 6])
@pytest.mark.parametrize("policy", POLICIES)
def test_demands_displace_guesses_in_the_smallest_pool(
    routes: Routes, policy: str, num_slots: int
) -> None:
    residency, timing = simulate(routes, maker(policy), ReplaySettings(num_slots=num_slots), DEVICE)
    assert residency.table.num_free + int(residency.table.is_ready.sum()) <= num_slots
    assert np.isfinite(timing.step_ms).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_they_agree_on_the_routes_of_the_tiny_checkpoint(tmp_path: Path, policy: str) -> None:
    recorded = Routes.load(ROOT / "tests/runtime/experts/tiny_routes.npz")
    recorded = replace(recorded, passes=recorded.passes[:120])
    report = run_pager(tmp_path / "experts.bin", recorded, policy, 10, look_ahead=True)
    residency = replay(recorded, maker(policy), ReplaySettings(num_slots=10))
    # The pager's table has the layer more that its file has.
    assert report["hits_by_layer"] == [*residency.hits.tolist(), 0]
    assert report["misses_by_layer"] == [*residency.misses.tolist(), 0]
    moved = sum(residency.num_loads.values()) * RECORD_BYTES
    assert sum(report["moved_bytes"].values()) == moved
