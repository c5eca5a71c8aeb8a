"""For any routes, the default policy is at most slightly worse than plain LRU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from deeptalk_edge.devices.profile import load_profile
from deeptalk_edge.devices.replay.simulator import ReplaySettings, simulate
from deeptalk_edge.devices.replay.study import device_of
from deeptalk_edge.devices.replay.synthetic import PRESETS, DialogueShape, synthetic_routes
from deeptalk_edge.runtime.experts.policy import POLICIES, Phase, Policy
from deeptalk_edge.runtime.experts.residency import Residency
from deeptalk_edge.runtime.experts.routes import Routes

NUM_LAYERS, NUM_EXPERTS, TOP_K, NUM_STEPS = 4, 16, 3, 150
DEVICE = device_of(load_profile("orin-nano-8gb"))

Steps = Iterator[list[list[int]]]
"""Experts by layer, step by step."""


def working_sets(random: np.random.Generator, *, size: int, num_steps: int) -> Steps:
    """A few experts for `length` steps, then suddenly others."""
    while True:
        chosen = [random.permutation(NUM_EXPERTS)[:size] for _ in range(NUM_LAYERS)]
        for _ in range(num_steps):
            yield [random.permutation(own)[:TOP_K].tolist() for own in chosen]


def drift(random: np.random.Generator, *, stay: float) -> Steps:
    """Each expert stays for the next step or is replaced by another one."""
    chosen = [random.permutation(NUM_EXPERTS)[:TOP_K].tolist() for _ in range(NUM_LAYERS)]
    while True:
        for own in chosen:
            for place in range(TOP_K):
                if random.random() > stay:
                    own[place] = int(random.choice(np.setdiff1d(np.arange(NUM_EXPERTS), own)))
        yield [list(own) for own in chosen]


def loop(random: np.random.Generator) -> Steps:
    """Every expert in turn, repeatedly."""
    while True:
        for start in range(0, NUM_EXPERTS - TOP_K, TOP_K):
            yield [list(range(start, start + TOP_K))] * NUM_LAYERS


TRACES: dict[str, Callable[[np.random.Generator], Steps]] = {
    "the same three": lambda random: working_sets(random, size=3, num_steps=NUM_STEPS),
    "six, then six others": lambda random: working_sets(random, size=6, num_steps=10),
    "five, then five others": lambda random: working_sets(random, size=5, num_steps=30),
    "four, then a break": lambda random: working_sets(random, size=4, num_steps=100),
    "no pattern": lambda random: working_sets(random, size=NUM_EXPERTS, num_steps=NUM_STEPS),
    "slow drift": lambda random: drift(random, stay=0.9),
    "fast drift": lambda random: drift(random, stay=0.5),
    "a loop": loop,
}


def num_misses(policy: str, steps: list[list[list[int]]], num_slots: int) -> int:
    num_keys = NUM_LAYERS * NUM_EXPERTS
    residency = Residency(
        num_layers=NUM_LAYERS,
        num_experts=NUM_EXPERTS,
        num_slots=num_slots,
        policy=POLICIES[policy](num_keys, NUM_EXPERTS, None),
    )
    table = residency.table
    for step in steps:
        residency.begin(Phase.SPEAKING)
        for row, experts in enumerate(step):
            keys = [row * NUM_EXPERTS + expert for expert in experts]
            loads = residency.demand(keys)
            assert loads is not None
            for load in loads:
                table.fill(load.slot)
            for key in keys:
                slot = table.slot_of[key]
                table.release([slot], [table.generations[slot]])
    return int(residency.misses.sum())


@pytest.mark.parametrize("trace", TRACES)
def test_no_trace_misses_more_than_a_few_percent_above_lru(trace: str) -> None:
    walk = TRACES[trace](np.random.default_rng(0))
    steps = [next(walk) for _ in range(NUM_STEPS)]
    num_uses = NUM_STEPS * NUM_LAYERS * TOP_K
    for num_slots in (8, 12, 16, 24, 40, 56):  # a step takes 12
        more = num_misses("phased", steps, num_slots) - num_misses("lru", steps, num_slots)
        assert more <= 0.04 * num_uses


def step_ms(routes: Routes, policy: str, num_slots: int, *, look_ahead: bool) -> float:
    """A step's simulated time."""
    settings = ReplaySettings(
        num_slots=num_slots, look_ahead=look_ahead, sweep_share=0.7 if look_ahead else 0.0
    )

    def make(num_keys: int, num_experts: int) -> Policy:
        return POLICIES[policy](num_keys, num_experts, None)

    return float(np.mean(simulate(routes, make, settings, DEVICE)[1].step_ms))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_dialogue_is_faster_than_with_lru(preset: str, look_ahead: bool) -> None:
    routes = synthetic_routes(preset, DialogueShape(num_layers=6, num_turns=3, question_s=1.0))
    lru_ms, phased_ms = (
        step_ms(routes, policy, round(0.42 * 6 * 64), look_ahead=look_ahead)
        for policy in ("lru", "phased")
    )
    assert phased_ms < lru_ms


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_pool_hardly_larger_than_a_step_is_not_slower_than_lru(look_ahead: bool) -> None:
    recorded = Routes.load(Path(__file__).parent / "tiny_routes.npz")
    num_slots = round(0.42 * len(recorded.layers) * recorded.num_experts)
    lru_ms, phased_ms = (
        step_ms(recorded, policy, num_slots, look_ahead=look_ahead) for policy in ("lru", "phased")
    )
    assert phased_ms <= 1.03 * lru_ms
